"""What a model is to us: its decoder, and of each attention layer the rotary table, layout and local window.

Nothing here is read from a list of families. A probe runs a few tokens through the decoder twice, once
with its real rotary modules and once with identities, and looks at the queries and keys that arrive at
the attention function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from everlong.errors import UnsupportedModelError
from everlong.models.refusals import refuse_unsupported
from everlong.models.rotary import (
    LAYOUTS,
    IdentityRotary,
    Layout,
    Rotary,
    find_rotaries,
    fresh_copy,
    is_rotary,
    rotate,
)
from everlong.models.seam import Seam
from everlong.models.unrotated import unrotated

_PROBE_POSITIONS = (5, 11, 37)
_OTHER_POSITIONS = (0, 1, 2)


@dataclass(frozen=True)
class LayerAnatomy:
    """One attention layer.

    Attributes
    ----------
    index : int
        The layer's number, as its cache knows it.
    module : nn.Module
        The attention module.
    window : int or None
        Keys a query sees in a local (sliding-window) layer, itself included; None: full attention.
    rotary : Rotary or None
        The table its queries and keys are rotated with; None: the layer has no rotary positions.
    layout : {"halves", "interleaved"}
        Which dimensions the rotation pairs.
    donor : int or None
        The earlier layer whose keys and values it uses (Gemma 4); None: it has its own.
    """

    index: int
    module: nn.Module
    window: int | None
    rotary: Rotary | None
    layout: Layout
    donor: int | None = None

    def is_like(self, other: LayerAnatomy) -> bool:
        """Whether both have the same window and rotate alike."""
        mine, theirs = ((x.window, x.rotary, x.layout) for x in (self, other))
        return mine == theirs


@dataclass(frozen=True)
class Anatomy:
    """A causal language model, taken apart as far as attention is concerned.

    Attributes
    ----------
    decoder : nn.Module
        The model without its head.
    layers : tuple of LayerAnatomy
        In the order they run.
    rotaries : tuple of Rotary
        All rotary tables.
    training_length : int or None
        Tokens the model was trained on at most (before any RoPE scaling); None: not known.
    can_skip_rotation : bool
        Whether :func:`~everlong.models.unrotated.unrotated` gives what rotation by identities does.
    """

    decoder: nn.Module
    layers: tuple[LayerAnatomy, ...]
    rotaries: tuple[Rotary, ...]
    training_length: int | None
    can_skip_rotation: bool


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the decoder (no head) of a causal language model, PEFT wrappers looked through."""
    inner: Any = model
    if hasattr(inner, "get_base_model") and hasattr(inner, "peft_config"):
        inner = inner.get_base_model()
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    if decoder is None:
        decoder = getattr(inner, "base_model", inner)
    assert isinstance(decoder, nn.Module)
    return decoder


def training_length_of(config: Any) -> int | None:
    """Return the training length: the original one where RoPE scaling is configured.

    Everlong's meaning of the word, see docs/concepts: ``max_position_embeddings``, unless the RoPE
    parameters name an ``original_max_position_embeddings``.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    tables = [parameters, *(table for table in parameters.values() if isinstance(table, dict))]
    originals = [
        int(table["original_max_position_embeddings"])
        for table in tables
        if table.get("original_max_position_embeddings")
    ]
    if originals:
        return min(originals)
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length else None


def dissect(model: nn.Module) -> Anatomy:
    """Take `model` apart, or refuse it by name.

    Raises
    ------
    UnsupportedModelError
        The model's attention cannot be driven from outside; the message says what is missing.
    """
    decoder = decoder_of(model)
    refuse_unsupported(model, decoder)
    rotaries = find_rotaries(decoder)
    name = type(model).__name__
    with replaced_rotaries(decoder, fresh_copy):
        real = _probe(decoder, _PROBE_POSITIONS)
    _check_layers(decoder, real, name)
    with replaced_rotaries(decoder, IdentityRotary):
        with unrotated(seen.module for seen in real):
            raw = _probe(decoder, _OTHER_POSITIONS)
        rotations = _rotations(raw, real, rotaries)
        can_skip = None not in rotations
        if not can_skip:
            raw, moved = _probe(decoder, _PROBE_POSITIONS), _probe(decoder, _OTHER_POSITIONS)
            _check_positions(raw, moved, name)
            rotations = _rotations(raw, real, rotaries)
    layers = [_layer(seen, rotation, name) for seen, rotation in zip(raw, rotations, strict=True)]
    own: dict[int, int] = {}  # where a layer's keys lie in memory, to the layer that made them
    for at, seen in enumerate(raw):
        donor = own.setdefault(seen.key.data_ptr(), layers[at].index)
        if donor != layers[at].index:
            layers[at] = replace(layers[at], donor=donor)
    return Anatomy(decoder, tuple(layers), tuple(rotaries), training_length_of(_config(decoder)), can_skip)


@contextmanager
def replaced_rotaries(decoder: nn.Module, replacement: Callable[[nn.Module], nn.Module]) -> Iterator[None]:
    """Put ``replacement(rotary)`` in the place of every rotary module below `decoder`, until the end."""
    replaced = [
        (parent, name, child)
        for parent in decoder.modules()
        for name, child in parent.named_children()
        if is_rotary(child)
    ]
    try:
        for parent, name, child in replaced:
            setattr(parent, name, replacement(child))
        yield
    finally:
        for parent, name, child in replaced:
            setattr(parent, name, child)


@dataclass(frozen=True)
class _Seen:
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    window: int | None
    is_plain: bool  # causal, and no mask or bias of the model's own


def _config(decoder: nn.Module) -> Any:
    return decoder.config


def _probe(decoder: nn.Module, positions: Sequence[int]) -> list[_Seen]:
    """Run a few tokens and collect what each attention layer receives; attention itself returns zeros."""
    seen: list[_Seen] = []

    def record(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        window = sliding_window
        if window is None and getattr(module, "is_sliding", False):
            window = getattr(module, "sliding_window", None)
        is_plain = attention_mask is None and bool(getattr(module, "is_causal", True))
        seen.append(_Seen(module, query.detach(), key.detach(), value.detach(), window, is_plain))
        batch, heads, n, _d = query.shape
        return query.new_zeros(batch, n, heads, value.shape[-1]), None

    device = next(decoder.parameters()).device
    if device.type == "meta":  # offloaded; accelerate brings weights and inputs together
        device = torch.device("cpu")
    position_ids = torch.tensor([list(positions)], device=device)
    ids = torch.arange(1, 1 + len(positions), device=device)[None]
    training = {module: module.training for module in decoder.modules()}
    decoder.eval()
    try:
        with Seam(decoder, record), torch.no_grad():
            decoder(input_ids=ids, position_ids=position_ids, use_cache=False)
    finally:
        for module, was in training.items():
            module.training = was
    return seen


def _check_layers(decoder: nn.Module, seen: list[_Seen], name: str) -> None:
    expected = int(_config(decoder).num_hidden_layers)
    if len(seen) > len({seen_layer.module.layer_idx for seen_layer in seen}):
        raise UnsupportedModelError(
            f"{name}: its layers attend more than once in a forward, which is not supported yet"
        )
    if len(seen) != expected:
        raise UnsupportedModelError(
            f"{name}: {len(seen)} of {expected} layers go through transformers' attention interface; "
            "the others (linear attention, state space, convolution, an attention of the model's own) "
            "cannot be driven"
        )
    if not all(layer.is_plain for layer in seen):
        raise UnsupportedModelError(f"{name}: its attention is not causal, or has a mask or bias of its own")


def _check_positions(seen: list[_Seen], moved: list[_Seen], name: str) -> None:
    if any(not _close(there.key, here.key) for here, there in zip(seen, moved, strict=True)):
        raise UnsupportedModelError(
            f"{name}: positions reach its keys by another way than rotary tables "
            "(learned or sinusoidal positions)"
        )


_Rotation = tuple[Rotary | None, Layout]


def _rotations(raw: list[_Seen], real: list[_Seen], rotaries: list[Rotary]) -> list[_Rotation | None]:
    """Find the table and layout that make of each layer's raw queries and keys its real ones; None: none."""
    return [_rotation(here, there, rotaries) for here, there in zip(raw, real, strict=True)]


def _rotation(raw: _Seen, real: _Seen, rotaries: list[Rotary]) -> _Rotation | None:
    if torch.equal(raw.key, real.key) and torch.equal(raw.query, real.query):
        return None, "halves"
    for rotary in rotaries:
        frequencies = rotary.frequencies(max(_PROBE_POSITIONS) + 1)
        for layout in LAYOUTS:
            cos, sin = frequencies.angles(torch.tensor(_PROBE_POSITIONS), layout, raw.query.device)
            if cos.shape[-1] <= raw.query.shape[-1] and all(
                _close(rotate(before, cos, sin, layout), after)
                for before, after in ((raw.query, real.query), (raw.key, real.key))
            ):
                return rotary, layout
    return None


def _layer(raw: _Seen, rotation: _Rotation | None, name: str) -> LayerAnatomy:
    index = int(raw.module.layer_idx)  # type: ignore[arg-type]
    if raw.key.shape[-1] != raw.value.shape[-1]:
        raise UnsupportedModelError(
            f"{name}: layer {index} has keys of size {raw.key.shape[-1]} and values of size "
            f"{raw.value.shape[-1]} (as in multi-head latent attention), which is not supported yet"
        )
    if rotation is None:
        raise UnsupportedModelError(
            f"{name}: layer {index} rotates its queries and keys in a way that none of the model's rotary "
            "tables explains; please open an issue with the model's name"
        )
    return LayerAnatomy(index, raw.module, raw.window, *rotation)


def _close(ours: Tensor, theirs: Tensor) -> bool:
    tolerance = 1e-3 if theirs.dtype == torch.float32 else 3e-2
    scale = theirs.float().abs().max().clamp(min=1e-12)
    return bool((ours.float() - theirs.float()).abs().max() <= tolerance * scale)
