"""Sequence packing: the new tokens of several streams as one row of one forward.

Everything but attention takes a token at a time, whatever stream it is of; attention takes the streams in
turn. Nothing is padded, and each stream may have its own length, its own past and its own policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Unpack

import torch
from torch import Tensor

from everlong.attention.cache import StreamCache
from everlong.attention.cache_interface import PolicyCache
from everlong.attention.forward import Forward, Layers, Underway
from everlong.attention.inputs import Inputs
from everlong.attention.parts import Logits
from everlong.errors import InputError, StateError, UnsupportedUseError
from everlong.models.adapters import Span


class PackedSequences(PolicyCache):
    """What a forward is given as its cache when its single row holds tokens of several streams.

    Parameters
    ----------
    caches : sequence of StreamCache
        One per stream, each of a single row without padding.
    counts : sequence of int
        New tokens of each, in the order in which they stand in the row; all at least 1.
    """

    def __init__(self, caches: Sequence[StreamCache], counts: Sequence[int]) -> None:
        if not caches or len(caches) != len(counts) or min(counts) < 1:
            raise InputError(f"{len(caches)} streams need as many counts of new tokens, not {list(counts)}")
        if len({id(cache) for cache in caches}) != len(caches):
            raise InputError("each stream stands in the row once: fork() one to go on from it twice")
        owners = {cache.owner for cache in caches}
        if len(owners) != 1:
            raise StateError("the streams belong to different models")
        if any(cache.rows not in (None, 1) or cache.pads for cache in caches):
            raise UnsupportedUseError("streams of several rows, or with padding, cannot be packed into a row")
        super().__init__(owners.pop())
        self.caches = list(caches)
        self.counts = list(counts)

    def begin(self, inputs: Inputs, layers: Layers, outer: Underway | None) -> PackedForward:
        """Enter a forward of all streams."""
        if inputs.rows != 1 or inputs.tokens != sum(self.counts):
            raise InputError(
                f"the streams have {sum(self.counts)} new tokens in one row; "
                f"the input has {inputs.rows} rows of {inputs.tokens}"
            )
        if any(inputs.arguments.get(name) is not None for name in ("attention_mask", "position_ids")):
            raise UnsupportedUseError("packed sequences take neither an attention mask nor position ids")
        for cache in self.caches:
            cache.admit(1)
        for cache in self.caches:
            cache.begin(1, None)
        self._in_forward = True
        forwards = [
            Forward(self.owner, layers, cache, count, is_kept=True)
            for cache, count in zip(self.caches, self.counts, strict=True)
        ]
        return PackedForward(self.owner, self, forwards, outer)

    def positions(self, device: torch.device) -> Tensor:
        """Position ids of the row, shape (1, n), each inside its stream's window."""
        pieces = []
        for cache, count in zip(self.caches, self.counts, strict=True):
            own = torch.arange(cache.seen, cache.seen + count, device=device)
            pieces.append(own if cache.window is None else own.clamp(max=cache.window - 1))
        return torch.cat(pieces)[None]

    def adapters(self, rows: int, tokens: int) -> list[Span]:
        """Return the adapters of the row's tokens, stream by stream."""
        return [(cache.adapter, count) for cache, count in zip(self.caches, self.counts, strict=True)]

    def abandon(self) -> None:
        """Leave the forward in all streams."""
        super().abandon()
        for cache in self.caches:
            cache.abandon()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing comes before the row as a whole."""
        return 0

    def __len__(self) -> int:
        return len(self.caches[0])


@dataclass
class PackedForward:
    """One forward of packed sequences under way; attributes as of :class:`Forward`."""

    owner: str
    cache: PackedSequences
    forwards: list[Forward]
    outer: Underway | None = None
    _edges: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        stop = 0
        for forward in self.forwards:
            self._edges.append((stop, stop + forward.tokens))
            stop += forward.tokens

    def attend(
        self, number: int, query: Tensor, key: Tensor, value: Tensor, **logits: Unpack[Logits]
    ) -> Tensor:
        """Let layer `number` attend stream by stream; parameters as of :meth:`Forward.attend`."""
        if query.shape[2] != key.shape[2]:
            raise UnsupportedUseError(
                "this model computes the last query alone: its streams cannot be packed"
            )
        outputs = [
            forward.attend(number, query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], **logits)
            for forward, (a, b) in zip(self.forwards, self._edges, strict=True)
        ]
        return torch.cat(outputs, dim=2)

    def finish(self) -> None:
        """Count the tokens of each stream."""
        for forward in self.forwards:
            forward.finish()
