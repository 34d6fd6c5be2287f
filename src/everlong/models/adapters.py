"""LoRA adapters on one model, of which each forward uses one, or none."""

from __future__ import annotations

import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import RLock
from typing import Any

from torch import Tensor, nn

from everlong.errors import UnsupportedUseError


class Adapters:
    """Adapters that streams of one model bring along. PEFT's layers are put in with the first.

    PEFT knows one active adapter for the whole model: a forward holds the lock while it runs with its own.

    Parameters
    ----------
    model : nn.Module
        A transformers model that has no adapters of PEFT's yet.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._loaded: dict[str, tuple[Any, Mapping[str, Tensor]]] = {}
        self._uses: Counter[str] = Counter()
        self._released: deque[str] = deque()
        self._layers: list[Any] = []
        self._current: str | None = None
        self._lock = RLock()

    def __len__(self) -> int:
        return len(self._loaded)

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

    def begin(self, name: str | None) -> None:
        """Let the forward that begins use adapter `name` (None: none), and no other forward run beside it."""
        self._lock.acquire()
        if name == self._current:
            return
        assert name is None or name in self._loaded, "whoever uses an adapter holds its Memories"
        for layer in self._layers:
            layer.enable_adapters(name is not None)
            if name is not None:
                layer.set_adapter([name] if name in layer.lora_A else [])
        self._current = name
        self._want_no_gradients()

    def end(self) -> None:
        """Let other forwards run."""
        self._lock.release()

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Within the block, the model is what it was without any adapter."""
        with self._lock:
            self.remove()
            self._forget_released()
            try:
                yield
            finally:
                for name in self._loaded:
                    self._put_in(name)

    def remove(self) -> None:
        """Take PEFT's layers out of the model."""
        with self._lock:
            if not self._layers:
                return
            for path, layer in list(self._model.named_modules()):
                if layer in self._layers:
                    parent, _, child = path.rpartition(".")
                    setattr(self._model.get_submodule(parent), child, layer.get_base_layer())
            self._model.__dict__.pop("peft_config", None)
            self._layers, self._current = [], None

    def _forget_released(self) -> None:
        while self._released:
            name = self._released.popleft()
            self._uses[name] -= 1
            if not self._uses[name]:
                del self._loaded[name], self._uses[name]

    def _put_in(self, name: str) -> None:
        from peft import inject_adapter_in_model, set_peft_model_state_dict
        from peft.tuners.tuners_utils import BaseTunerLayer

        if not self._layers and any(isinstance(module, BaseTunerLayer) for module in self._model.modules()):
            raise UnsupportedUseError(
                "this model has adapters of PEFT's already: memories are used with the bare model "
                "(merge_and_unload() the adapters, or load the model without them)"
            )
        config, tensors = self._loaded[name]
        wanted = {parameter: parameter.requires_grad for parameter in self._model.parameters()}
        with while_peft_wraps():
            model: Any = inject_adapter_in_model(config, self._model, adapter_name=name)
        set_peft_model_state_dict(model, _unprefixed(tensors), adapter_name=name)
        for parameter, wants in wanted.items():
            parameter.requires_grad_(wants)
        self._layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        for layer in self._layers:
            layer.enable_adapters(False)
        self._current = None
        self._want_no_gradients()

    def _want_no_gradients(self) -> None:
        for layer in self._layers:
            for name in layer.adapter_layer_names:
                for parameter in getattr(layer, name).parameters():
                    parameter.requires_grad_(False)


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
