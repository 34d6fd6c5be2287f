"""Linear layers with a second, packed copy of their weights, for forwards of a few rows.

Writing reads every weight once a token, and that is what it costs; reading multiplies hundreds of rows
with each weight and is bound by arithmetic. So a packed layer keeps its float weights for many rows and
has a copy in 8 or 4 bits for few. It stays the linear layer it was: adapters that wrap it, and code that
looks at its weights, see no difference.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from threading import Lock
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everlong.errors import ConfigurationError, UnsupportedUseError
from everlong.models.anatomy import decoder_of
from everlong.models.files import human_bytes
from everlong.models.packed_weights import Half, Int4, Int8, Packed, kernels_missing
from everlong.models.placement import available_bytes
from everlong.registry import unknown_name

Weights = Literal["auto", "float", "int8", "int4"]
"""How weights are kept for forwards of a few rows; "auto": as model and machine suggest."""

MOST_ROWS = 64
"""Rows up to which a forward uses packed weights: all of writing, guesses included, and short texts."""

_WORTH_IT = 32 * 2**20  # bytes of float weights: fewer fit into a processor's caches as they are
_LOSSLESS = 2.0**-8  # of a group's span: the rounding of a bfloat16 scale
_KINDS: dict[str, type[Packed]] = {"int8": Int8, "int4": Int4}
_one_packs = Lock()  # of threads that write with one model
_changes = count(1)
_latest_change = 0


class Product:
    """The packed weights of linear layers that are given the same input, multiplied with all at once.

    They are packed when first multiplied with: who loads a model to read with it never waits for that.

    Parameters
    ----------
    weights : list of Tensor
        Each of shape (out, in), the out of each its own.
    packed_as : type
        How they are packed, one below the other.

    Attributes
    ----------
    sizes : list of int
        The out of each.
    is_in_use : bool
        Whether the layers still multiply with it.
    """

    def __init__(self, weights: list[Tensor], packed_as: type[Packed]) -> None:
        self.sizes = [len(weight) for weight in weights]
        self.is_in_use = True
        self._weights = weights
        self._packed_as = packed_as
        self._packed: Packed | None = None
        self._latest: tuple[Tensor, list[Tensor | None]] | None = None

    @property
    def packed(self) -> Packed:
        """The packed weights."""
        if self._packed is None:
            with _one_packs:
                if self._packed is None:
                    self._packed, self._weights = self._packed_as(*self._weights), []
        return self._packed

    def __call__(self, input: Tensor, which: int) -> Tensor:
        """Return the product of `input`, shape (…, in), with weight number `which`, shape (…, out).

        The first layer that is given an input multiplies for all; each of the others takes its share once.
        """
        if len(self.sizes) == 1:
            return self._multiplied(input)
        latest = self._latest  # read once: another thread may replace it
        share = None if latest is None or latest[0] is not input else latest[1][which]
        if latest is None or share is None:
            latest = self._latest = input, [*torch.split(self._multiplied(input), self.sizes, -1)]
            share = latest[1][which]
        latest[1][which] = None
        if which == len(self.sizes) - 1:
            self._latest = None
        assert share is not None
        return share

    def _multiplied(self, input: Tensor) -> Tensor:
        product = self.packed(input.reshape(-1, input.shape[-1]))
        return product.view(*input.shape[:-1], product.shape[-1])

    def __deepcopy__(self, memo: dict[int, Any]) -> Product:
        return self  # what it keeps belongs to the input it was given


class PackedLinear(nn.Linear):
    """A linear layer with a packed copy of its weights. Layers become one, and again what they were."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the product, by the packed weights where there are few rows and no gradient is wanted."""
        own = self.__dict__
        if input.numel() > own["_everlong_most"] or torch.is_grad_enabled() or input.device.type != "cpu":
            return F.linear(input, self.weight, self.bias)
        product, which = own["_everlong_product"]
        output: Tensor = product(input, which)
        bias = own["_parameters"]["bias"]
        return output if bias is None else output + bias


class Packing:
    """The packed layers of one model; what :func:`pack` returns.

    Attributes
    ----------
    kind : {"int8", "int4"}
        How the weights are packed.
    nbytes : int
        Held besides the float weights, once all are packed.
    """

    def __init__(self, kind: str, layers: list[nn.Linear], nbytes: int) -> None:
        self.kind = kind
        self.nbytes = nbytes
        self._layers = layers

    def undo(self) -> None:
        """Make the layers what they were. A second call does nothing."""
        for layer in self._layers:
            layer.__class__ = nn.Linear
            _discard(layer)
        self._layers = []
        _note_change()


def pack(model: nn.Module, kind: Literal["int8", "int4"]) -> Packing:
    """Give the linear layers of `model` a packed copy of their weights, made when it is first used.

    The head, whose logits must not be rounded coarsely, is packed in float16; layers of a shape or kind that
    the kernels do not take stay as they are. Weights that change later must be packed again.

    Parameters
    ----------
    model : nn.Module
        A causal language model on the CPU, in float32 or bfloat16.
    kind : {"int8", "int4"}
        See :class:`~everlong.models.packed_weights.Int8` and :class:`~everlong.models.packed_weights.Int4`.

    Raises
    ------
    UnsupportedUseError
        Nothing here can be packed: the model is on another device, or this PyTorch has no such kernels.
    ConfigurationError
        The copy does not fit into memory.
    """
    missing = kernels_missing()
    chosen = list(_packable(model, kind))
    if missing or not chosen:
        reason = missing or "it has no linear layers on the CPU in float32 or bfloat16 that fit the kernels"
        raise UnsupportedUseError(f"weights={kind!r} is not possible for this model: {reason}; use 'float'")
    needed, available = bytes_of(model, kind), _available()
    if needed > available:
        raise ConfigurationError(
            f"weights={kind!r} needs {human_bytes(needed)} besides the float weights, and "
            f"{human_bytes(available)} are available: use weights='float'"
        )
    products = [
        (layers, Product([layer.weight.detach() for layer in layers], packed_as))
        for layers, packed_as in _siblings(model, dict(chosen))
    ]
    packing = Packing(kind, list(dict(chosen)), needed)
    try:
        for layers, product in products:
            for which, layer in enumerate(layers):
                _discard(layer)
                layer.__dict__["_everlong_product"] = product, which
                layer.__dict__["_everlong_most"] = MOST_ROWS * layer.in_features
                layer.__class__ = PackedLinear
    except BaseException:
        packing.undo()
        raise
    _note_change()
    return packing


@contextmanager
def by_float_weights(model: nn.Module) -> Iterator[None]:
    """Let packed layers use their float weights within the block, where rounding would blur a comparison."""
    layers = [module for module in model.modules() if type(module) is PackedLinear]
    most = [layer.__dict__["_everlong_most"] for layer in layers]
    try:
        for layer in layers:
            layer.__dict__["_everlong_most"] = -1
        _note_change()
        yield
    finally:
        for layer, rows in zip(layers, most, strict=True):
            layer.__dict__["_everlong_most"] = rows
        _note_change()


def packing_state() -> int:
    """Return a number that is another one after any layer, of any model, was packed otherwise."""
    return _latest_change


def _note_change() -> None:
    """Tell that layers are packed otherwise now; called after it is so, by any thread."""
    global _latest_change
    _latest_change = next(_changes)


def _discard(layer: nn.Module) -> None:
    """Take a layer's packed weights away, if it has any."""
    product, _ = layer.__dict__.pop("_everlong_product", (None, None))
    layer.__dict__.pop("_everlong_most", None)
    if product is not None:
        product.is_in_use = False


def _siblings(
    model: nn.Module, packed_as: dict[nn.Linear, type[Packed]]
) -> list[tuple[list[nn.Linear], type[Packed]]]:
    """Put layers together that a forward gives the same input, and that are packed alike."""
    found: dict[Any, list[nn.Linear]] = {}
    inputs: list[Tensor] = []  # kept, so that no two have the same id

    def note(layer: nn.Linear, input: Tensor) -> Tensor:
        inputs.append(input)
        group = found.setdefault((id(input), packed_as[layer]), [])
        if not any(layer in others for others in found.values()):
            group.append(layer)
        return input.new_zeros(*input.shape[:-1], layer.out_features)  # sooner made than a product

    decoder: Any = decoder_of(model)
    device = decoder.get_input_embeddings().weight.device
    with ExitStack() as forwards, torch.no_grad():
        for layer in packed_as:
            forwards.enter_context(_standing_in(layer, partial(note, layer)))
        tokens = torch.zeros((1, 2), dtype=torch.long, device=device)  # of one alone, layers may run lean
        decoder(input_ids=tokens, use_cache=False)
    groups = [group for group in found.values() if group]
    seen = {layer for group in groups for layer in group}
    groups += [[layer] for layer in packed_as if layer not in seen]  # experts that were not asked
    return [(group, packed_as[group[0]]) for group in groups]


@contextmanager
def _standing_in(layer: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Let `forward` stand in for a layer's own, until the end."""
    before = layer.__dict__.get("forward")  # accelerate's hooks put one there
    layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        layer.__dict__.pop("forward")
        if before is not None:
            layer.__dict__["forward"] = before


def bytes_of(model: nn.Module, kind: Literal["int8", "int4"]) -> int:
    """Bytes that packing would take besides the float weights."""
    return sum(packed_as.bytes_for(layer.weight) for layer, packed_as in _packable(model, kind))


def choose_weights(model: nn.Module, asked: str) -> Literal["float", "int8", "int4"]:
    """Settle what "auto" means for a model: packed where that pays and fits.

    It pays where the weights do not fit into caches. It fits where the packed copy takes at most half of the
    memory that is available. Four bits are chosen where they lose nothing (a model that came with them), else
    eight.

    Raises
    ------
    UnknownNameError
        `asked` is no such choice.
    """
    if asked not in get_args(Weights):
        raise unknown_name("choice of weights", asked, list(get_args(Weights)))
    if asked != "auto":
        return asked  # type: ignore[return-value]
    layers = list(_packable(model, "int4"))
    if kernels_missing() or sum(layer.weight.nbytes for layer, _ in layers) < _WORTH_IT:
        return "float"
    in_four = [layer for layer, packed_as in layers if packed_as is Int4]
    kind: Literal["int8", "int4"] = "int4" if _came_in_four_bits(in_four) else "int8"
    return kind if 2 * bytes_of(model, kind) <= _available() else "float"


def _packable(model: nn.Module, kind: str) -> Iterator[tuple[nn.Linear, type[Packed]]]:
    """Yield the layers that can be packed, and as what."""
    inner: Any = model
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    head = getattr(head, "base_layer", head)  # an adapter's wrapper
    for name, module in model.named_modules():
        is_adapter = any(
            part.startswith("lora_") for part in name.split(".")
        )  # they are trained, and swapped
        if is_adapter or type(module) not in (nn.Linear, PackedLinear):
            continue
        assert isinstance(module, nn.Linear)
        weight, packed_as = module.weight, Half if module is head else _KINDS[kind]
        if weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16):
            if packed_as is Int4 and not Int4.fits(weight):
                packed_as = Int8
            if packed_as.fits(weight):
                yield module, packed_as


def _came_in_four_bits(layers: list[nn.Linear]) -> bool:
    """Whether 4 bits give the weights back: looked at in a few layers."""
    some = layers[:: max(1, len(layers) // 4)]
    return bool(some) and all(Int4.loss(layer.weight.detach()) < _LOSSLESS for layer in some)


def _available() -> int:
    """Bytes of memory that can be taken without swapping; where that is not known, half of all there is."""
    known = available_bytes(torch.device("cpu"))
    if known is not None:
        return known
    pages: int = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return pages * os.sysconf("SC_PAGE_SIZE") // 2 if pages else 2**62
