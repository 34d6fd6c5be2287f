"""What arrives at an attached decoder's forward: read, checked, and refused where it cannot be followed."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from everlong.attention.cache import StreamCache
from everlong.attention.cache_interface import PolicyCache
from everlong.errors import InputError, StateError, UnsupportedUseError
from everlong.models.cache_argument import CACHE_ARGUMENTS


@dataclass(frozen=True, eq=False)
class Inputs:
    """The arguments of one forward of a decoder.

    Attributes
    ----------
    arguments : dict
        By name.
    cache : Any
        What was given as the cache, under either of its names; None: nothing.
    rows, tokens : int
        Batch size, and new tokens per row.
    device : torch.device
        Where the new tokens are.
    """

    arguments: dict[str, Any]
    cache: Any
    rows: int
    tokens: int
    device: torch.device

    @classmethod
    def read(cls, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """Bind the call's arguments by name."""
        arguments = dict(kwargs)
        if args:
            names = [name for name in inspect.signature(decoder.forward).parameters if name != "self"]
            arguments.update(zip(names, args, strict=False))
        caches = [arguments.pop(name, None) for name in CACHE_ARGUMENTS]
        cache = next((cache for cache in caches if cache is not None), None)
        if any(other is not None and other is not cache for other in caches):
            raise InputError(f"two caches were given, as {' and as '.join(CACHE_ARGUMENTS)}: pass one")
        given = arguments.get("input_ids")
        if given is None:
            given = arguments.get("inputs_embeds")
        if given is None:
            raise InputError("forward needs input_ids or inputs_embeds")
        if given.shape[1] == 0:
            raise InputError(
                "forward was given zero tokens: the prompt is empty, or all of it is in the cache already"
            )
        if arguments.get("output_attentions"):
            raise UnsupportedUseError(
                "attention weights are not computed under a policy: leave output_attentions out"
            )
        if decoder.training and any(getattr(m, "gradient_checkpointing", False) for m in decoder.modules()):
            raise UnsupportedUseError(
                "gradient checkpointing runs layers a second time outside the forward: "
                "call gradient_checkpointing_disable() while attached"
            )
        return cls(arguments, cache, given.shape[0], given.shape[1], given.device)


def refuse_foreign_cache(cache: Any, owner: str, kind: type[PolicyCache] = PolicyCache) -> None:
    """Raise unless `cache` is one of this attachment's own, of this kind."""
    if not isinstance(cache, kind):
        raise UnsupportedUseError(
            f"a {type(cache).__name__} cannot follow a policy (its keys are, or will be, rotated already): "
            "leave it out, or pass handle.new_cache()"
        )
    if cache.owner != owner:
        raise StateError(
            "this cache belongs to another model, or to an attachment that has ended: start a new one"
        )


def read_padding(inputs: Inputs, cache: StreamCache) -> tuple[int, ...] | None:
    """Return each row's left padding from the 2-D mask, checked against the cache's; None: no padding."""
    mask = inputs.arguments.get("attention_mask")
    if isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.dim() != 2):
        raise UnsupportedUseError(
            "a prepared 4-D mask cannot be combined with a policy: pass the 2-D padding mask"
        )
    if mask is None:
        return cache.pads
    mask = mask.to("cpu", torch.bool)
    if bool(mask.all()) and not cache.pads:
        return None
    total = cache.seen + inputs.tokens
    if mask.shape != (inputs.rows, total):
        raise InputError(
            f"the attention mask has shape {tuple(mask.shape)}; "
            f"{inputs.rows} rows of {total} tokens were expected: "
            f"{cache.seen} seen before and {inputs.tokens} new"
        )
    pads = tuple(int(pad) for pad in (~mask).cumprod(dim=1).sum(dim=1))
    if any(not bool(mask[row, pad:].all()) for row, pad in enumerate(pads)):
        raise InputError(
            "only left padding is supported: the mask has zeros after a row's first token (pad left)"
        )
    before = cache.pads or ((0,) * inputs.rows if cache.seen else pads)
    if any(now != then and then < cache.seen for now, then in zip(pads, before, strict=True)):
        raise StateError(f"the mask says {pads} padding tokens per row, the cache was filled with {before}")
    return pads if any(pads) else None


def clamped_positions(
    inputs: Inputs, cache: StreamCache, pads: tuple[int, ...] | None, span: int | None
) -> Tensor:
    """Return position ids inside the window, after checking that those given continue the cache's count.

    Rotation does not need them; models that scale queries by absolute position do, and must not see
    positions they were never trained on.
    """
    ahead = torch.arange(inputs.tokens) if cache.branches is None else cache.branches.depths
    if len(ahead) != inputs.tokens:
        raise InputError(f"the branches have {len(ahead)} tokens, the input {inputs.tokens}")
    expected = (cache.seen + ahead).to(inputs.device)[None]
    own = expected if pads is None else expected - torch.tensor(pads, device=inputs.device)[:, None]
    given = inputs.arguments.get("position_ids")
    if given is not None:
        if given.dim() != 2:
            raise UnsupportedUseError("position ids of several dimensions (images, video) are not supported")
        if given.shape[0] not in (1, inputs.rows) or given.shape[1] != inputs.tokens:
            raise InputError(
                f"position_ids have shape {tuple(given.shape)}, "
                f"for {inputs.rows} rows of {inputs.tokens} new tokens"
            )
        given, real = given.to(inputs.device), own >= 0
        if not (_agree(given, expected, real) or _agree(given, own, real)):
            raise StateError(
                f"position_ids must continue the cache's count from {cache.seen}: "
                "leave them out and they will; with generate(), pass all ids, "
                "or only the new ones with an attention_mask over all"
            )
    own = own - cache.folded
    return own.clamp(min=0) if span is None else own.clamp(min=0, max=span - 1)


def _agree(given: Tensor, expected: Tensor, real: Tensor) -> bool:
    return bool(((given == expected) | ~real).all())
