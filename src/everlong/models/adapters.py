"""LoRA adapters on one model, of which each token of a forward uses one, or none.

Where all tokens use the same one, it is PEFT's active adapter. Where they do not, PEFT's layers are switched
off, and to what the model's own layers make of some tokens is added what the adapter of these makes of them.
"""

from __future__ import annotations

import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from operator import itemgetter
from threading import RLock
from typing import Any
from weakref import WeakMethod

from torch import Tensor, nn

from everlong.errors import UnsupportedUseError

Span = tuple[str | None, int]
"""An adapter (None: none), and how many tokens it is for."""


class Adapters:
    """Adapters that streams of one model bring along. PEFT's layers are put in with the first.

    What is active is so for the whole model: a forward holds the lock while it runs with its own.

    Parameters
    ----------
    model : nn.Module
        A transformers model that has no adapters of PEFT's yet.
    close : method
        Ends this thread's forward if one is still open, as after a KeyboardInterrupt in it. Its object holds
        these adapters, and is not held by them.
    """

    def __init__(self, model: nn.Module, close: Callable[[], object]) -> None:
        self._model = model
        self._close = WeakMethod(close)
        self._is_whole = True  # nothing that changes the layers was interrupted
        self._loaded: dict[str, tuple[Any, Mapping[str, Tensor]]] = {}
        self._uses: Counter[str] = Counter()
        self._released: deque[str] = deque()
        self._layers: list[Any] = []
        self._in: set[str] = set()  # of those loaded, what PEFT's layers have
        self._current: str | None | tuple[Span, ...] = None
        self._hooks: list[Any] = []  # on the layers, while tokens differ
        self._alone: set[str] = set()
        self._aside = 0  # blocks within which all are
        self._lock = RLock()

    def __len__(self) -> int:
        return len(self._loaded)

    @property
    def are_needed(self) -> bool:
        """Whether a forward must :meth:`begin`: there are some, or somebody has the model without any."""
        return bool(self._loaded) or self._aside > 0 or not self._is_whole

    def load(self, name: str, config: Any, tensors: Mapping[str, Tensor]) -> None:
        """Put an adapter beside the others.

        Parameters
        ----------
        name : str
            What it is called here; one that is there already stays as it is.
        config : peft.LoraConfig
            Its configuration.
        tensors : mapping of str to Tensor
            Its weights, as PEFT saves them.
        """
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = config, tensors
                try:
                    self._put_in(name)
                except BaseException:
                    del self._loaded[name]
                    raise
            self._uses[name] += 1

    def loaded(self, name: str) -> tuple[Any, Mapping[str, Tensor]]:
        """Return the configuration and the weights of an adapter that is here."""
        return self._loaded[name]

    def release(self, name: str) -> None:
        """Take back one :meth:`load`; after the last, the adapter goes when all are next set aside.

        Called by the garbage collector, in the middle of anything: it only takes note.
        """
        self._released.append(name)

    def group(self, name: str | None) -> str | None:
        """Say which forwards adapter `name` may be used in: any two with the same answer run together.

        All that are plain LoRA do, and what uses none; any other only with itself.
        """
        return name if name in self._alone else None

    def refuse_mixture(self, spans: Sequence[Span]) -> None:
        """Raise if a forward has adapters of different groups."""
        if len({self.group(name) for name, _ in spans}) > 1:
            raise UnsupportedUseError(
                "one of these adapters is not plain LoRA on linear layers: streams with it and without it do "
                "not run together"
            )

    def begin(self, spans: Sequence[Span]) -> None:
        """Let the forward that begins use these adapters, and no other forward run beside it.

        Parameters
        ----------
        spans : sequence of (str or None, int)
            The adapter of its first so many tokens, of the next, and so on, row after row; all of one group.

        Raises
        ------
        UnsupportedUseError
            This thread has set all adapters aside, as while something is learned, and the forward has one.
        """
        joined = tuple(
            (name, sum(count for _, count in same)) for name, same in groupby(spans, itemgetter(0))
        )
        wanted = joined[0][0] if len(joined) == 1 else joined
        assert all(name is None or name in self._loaded for name, _ in joined), (
            "whoever uses an adapter holds its Memories"
        )
        self._lock.acquire()
        try:
            if self._aside and wanted is not None:
                raise UnsupportedUseError(
                    "while a text is learned, no session with memories runs in the thread that learns it: "
                    "let it wait until the end"
                )
            self._put_back()
            if wanted != self._current:
                self._use(wanted)
        except BaseException:
            self._lock.release()
            raise

    def _use(self, wanted: str | None | tuple[Span, ...]) -> None:
        with self._changing():
            self._unhook()
            name, before = (now if isinstance(now, str) else None for now in (wanted, self._current))
            if name != before:
                self._activate(name)
            if isinstance(wanted, tuple):
                self._hook(wanted)
            self._current = wanted

    def end(self) -> None:
        """Let other forwards run."""
        self._lock.release()

    @contextmanager
    def active(self, name: str | None) -> Iterator[None]:
        """Within the block, forwards of this thread use adapter `name` (None: none), and no others run."""
        if not self.are_needed:
            yield
            return
        self.begin([(name, 1)])
        try:
            yield
        finally:
            self.end()

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Within the block, and blocks within it, the model is what it was without any adapter."""
        with self._lock:
            self._aside += 1
            try:
                self.remove()
                self._forget_released()
                yield
            finally:
                if (close := self._close()) is not None:
                    close()
                self._aside -= 1
                self._put_back()

    def remove(self) -> None:
        """Take PEFT's layers out of the model."""
        with self._lock:
            if not self._layers and self._is_whole:
                return
            with self._changing():
                take_out_adapters(self._model)
                self._unhook()
                self._layers, self._in, self._current = [], set(), None

    def _put_back(self) -> None:
        """Put in what is not, unless all are aside; all anew, where an interruption left them half."""
        if self._aside:
            return
        if not self._is_whole:
            self.remove()
        for name in [name for name in self._loaded if name not in self._in]:
            self._put_in(name)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Note, while layers are changed, that they are half changed: whatever interrupts it."""
        self._is_whole = False
        yield
        self._is_whole = True

    def _forget_released(self) -> None:
        while self._released:
            name = self._released.popleft()
            self._uses[name] -= 1
            if not self._uses[name]:
                del self._loaded[name], self._uses[name]
                self._alone.discard(name)

    def _put_in(self, name: str) -> None:
        from peft import inject_adapter_in_model, set_peft_model_state_dict
        from peft.tuners.lora import Linear
        from peft.tuners.tuners_utils import BaseTunerLayer

        if not self._layers and any(isinstance(module, BaseTunerLayer) for module in self._model.modules()):
            raise UnsupportedUseError(
                "this model has adapters of PEFT's already: memories are used with the bare model "
                "(merge_and_unload() the adapters, or load the model without them)"
            )
        config, tensors = self._loaded[name]
        wanted = {parameter: parameter.requires_grad for parameter in self._model.parameters()}
        try:
            with self._changing():
                with while_peft_wraps():
                    model: Any = inject_adapter_in_model(config, self._model, adapter_name=name)
                set_peft_model_state_dict(model, _unprefixed(tensors), adapter_name=name)
                self._layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
                for layer in self._layers:
                    layer.enable_adapters(False)
                    for part in layer.children():
                        if part is not layer.base_layer:
                            part.eval()  # no dropout: PEFT makes them for training
                self._unhook()
                self._current = None
                self._want_no_gradients()
                own = [layer for layer in self._layers if _has(layer, name)]
                if not all(type(layer) is Linear and _is_plain(layer, name) for layer in own):
                    self._alone.add(name)
                self._in.add(name)
        except BaseException:  # some layers may have it
            self.remove()
            raise
        finally:
            for parameter, wants in wanted.items():
                parameter.requires_grad_(wants)

    def _activate(self, name: str | None) -> None:
        """Let all tokens use an adapter, by PEFT's own code."""
        for layer in self._layers:
            layer.enable_adapters(name is not None)
            if name is not None:
                layer.set_adapter([name] if name in layer.lora_A else [])
        self._want_no_gradients()

    def _hook(self, spans: Sequence[Span]) -> None:
        """Let each layer add what the adapters make of their tokens."""
        stops = list(accumulate(count for _, count in spans))
        for layer in self._layers:
            shares = [
                _Share(stop - count, stop, *_factors(layer, name))
                for (name, count), stop in zip(spans, stops, strict=True)
                if name is not None and name in layer.lora_A
            ]
            if shares:
                self._hooks.append(layer.register_forward_hook(partial(_add, shares, stops[-1])))

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _want_no_gradients(self) -> None:
        for layer in self._layers:
            for name in layer.adapter_layer_names:
                for parameter in getattr(layer, name).parameters():
                    parameter.requires_grad_(False)


@dataclass(frozen=True, eq=False)
class _Share:
    """One layer's part of an adapter, and the tokens it is for.

    Attributes
    ----------
    start, stop : int
        The tokens, counted through all rows.
    lower, upper : Tensor (in, rank), (rank, out)
        Its factors.
    scaling : float
        Of their product.
    """

    start: int
    stop: int
    lower: Tensor
    upper: Tensor
    scaling: float


def _add(
    shares: Sequence[_Share], tokens: int, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    """Add to a layer's output, in place; a hook."""
    x, y = inputs[0].flatten(0, -2), output.view(-1, output.shape[-1])
    if len(x) != tokens:
        raise UnsupportedUseError(
            f"a layer with adapters is given {len(x)} of {tokens} tokens, so that it cannot be told which of "
            "them is whose: let these streams run one after another"
        )
    for share in shares:
        some = slice(share.start, share.stop)
        y[some].addmm_(x[some] @ share.lower, share.upper, alpha=share.scaling)


def _factors(layer: Any, name: str) -> tuple[Tensor, Tensor, float]:
    """Return what an adapter has in a layer: factors (in, rank) and (rank, out), and their scaling."""
    lower, upper = (part[name].weight.detach().t() for part in (layer.lora_A, layer.lora_B))
    return lower, upper, layer.scaling[name]


def _has(layer: Any, name: str) -> bool:
    """Whether an adapter of PEFT's changes a layer."""
    return any(name in getattr(layer, part) for part in layer.adapter_layer_names)


def _is_plain(layer: Any, name: str) -> bool:
    """Whether all that an adapter does in a linear layer is to add a product of two factors."""
    return name not in layer.lora_variant and layer.lora_B[name].bias is None


def take_out_adapters(model: nn.Module) -> None:
    """Put the model's own layers in the place of PEFT's, of all that there are."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            parent, _, child = path.rpartition(".")
            own: Any = layer
            setattr(model.get_submodule(parent), child, own.get_base_layer())
    model.__dict__.pop("peft_config", None)


@contextmanager
def while_peft_wraps() -> Iterator[None]:
    """Keep to ourselves what PEFT says of names of transformers that will go, and of a second adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
        yield


def _unprefixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return saved weights by the names they have in the bare model."""
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
