"""Attention of one row, one query and one key at a time, straight from the definitions of the methods.

Slow and obvious on purpose: the fast implementation is held against this one, which shares no code with it.
Positions i (query) and j (key) count the real tokens of a row; padding is no token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .recall import recalled_keys

Places = tuple[int, int]
"""The positions by which a query and a key are rotated before their dot product."""


@dataclass(frozen=True)
class ReferenceSpec:
    """A method and its constants.

    Parameters
    ----------
    kind
        `"full"`: every query sees all keys up to itself. `"lm-infinite"` and `"streaming-llm"`: the sinks and
        the most recent keys. `"inf-llm"`, `"re-attention"`, `"recall"`, `"quest"` and `"infinite-hip"`: a
        query before W sees all keys up to itself; a later one sees the sinks, the latest keys, and what its
        group of queries recalls, for Quest and InfiniteHiP each key-value head its own.
        `"self-extend"` and `"dual-chunk"`: every query sees all keys up to itself, at other positions.
    sinks
        G, the first tokens of the row, seen by every query.
    window
        W, all keys a query sees, itself and the sinks included: W - G recent ones, or, where it recalls,
        up to R recalled and L = W - G - R recent ones.
    ceiling
        The distance that larger distances count as; None: every distance counts as it is.
    top_k
        For LM-Infinite: middle keys that each query and query head adds to what it sees.
    top_k_layers
        The first layer (from 0) that adds them.
    top_k_distance
        The distance at which middle keys are ranked and scored; None: half the window.
    recalled
        R, the most keys that a group of queries recalls.
    block
        For InfLLM, Recall, Quest and InfiniteHiP: B, the keys in a block. Blocks are recalled whole.
    representatives
        For InfLLM: m, the keys of a block whose mean stands for it.
    votes
        For ReAttention: v, the keys that each query and query head votes for.
    radius
        For ReAttention: r, how far from a chosen key its neighbours are recalled.
    distance
        For Recall: how far before a query sinks and recalled keys stand; L - 1 by default.
    layers
        For Recall: layers, one after another, of which the first asks what all of them recall.
    probes
        For Recall: of a group's asking queries, the last so many less one ask each by itself, and the mean of
        the others.
    lead
        For Recall: keys at the end of a block that count for the next block, too.
    steps
        For Recall: queries that come one by one, of which the first asks what all of them recall.
    momentum
        For Recall: how much counts, where a query comes alone and asks, what blocks were given before.
    coarse, medium
        For InfiniteHiP: keys in a chunk of the first two stages.
    coarse_steps, medium_steps, block_steps
        For InfiniteHiP: how many single queries use what each stage chose.
    neighbours
        For SelfExtend: W, from which distance on keys are grouped.
    group_size
        For SelfExtend: keys of a group, which share a position.
    chunk
        For DualChunk: s, the keys of a chunk.
    positions
        For DualChunk: c, the positions in use.
    """

    kind: Literal[
        "full",
        "lm-infinite",
        "streaming-llm",
        "inf-llm",
        "re-attention",
        "recall",
        "quest",
        "infinite-hip",
        "self-extend",
        "dual-chunk",
    ] = "full"
    sinks: int = 0
    window: int | None = None
    ceiling: int | None = None
    top_k: int = 0
    top_k_layers: int = 4
    top_k_distance: int | None = None
    recalled: int = 0
    block: int = 0
    representatives: int = 0
    votes: int = 0
    radius: int = 0
    distance: int | None = None
    layers: int = 1
    steps: int = 1
    probes: int = 1
    lead: int = 0
    momentum: float = 0.0
    coarse: int = 0
    medium: int = 0
    coarse_steps: int = 0
    medium_steps: int = 0
    block_steps: int = 0
    neighbours: int = 0
    group_size: int = 0
    chunk: int = 0
    positions: int = 0

    def __post_init__(self) -> None:
        """Refuse constants that have no meaning."""
        if self.kind in ("full", "self-extend", "dual-chunk"):
            meaningful = self.window is None and self.sinks == 0 and self.top_k == 0
        else:
            meaningful = self.window is not None and self.window > self.sinks >= 0 and self.top_k >= 0
        if self.kind not in ("full", "lm-infinite"):
            meaningful = meaningful and self.ceiling is None and self.top_k == 0
        if self.recalls:
            meaningful = meaningful and self.recalled >= 0 and self.local > 0
        else:
            meaningful = meaningful and self.recalled == 0
        meaningful = meaningful and (self.block > 0) == (
            self.kind in ("inf-llm", "recall", "quest", "infinite-hip")
        )
        meaningful = meaningful and (self.representatives > 0) == (self.kind == "inf-llm")
        meaningful = meaningful and (self.distance is None or self.kind == "recall")
        meaningful = meaningful and self.layers >= 1 and (self.layers == 1 or self.kind == "recall")
        meaningful = meaningful and self.probes >= 1 and (self.probes == 1 or self.kind == "recall")
        meaningful = meaningful and self.steps >= 1 and (self.steps == 1 or self.kind == "recall")
        meaningful = meaningful and 0 <= self.lead <= self.block and (self.lead == 0 or self.kind == "recall")
        meaningful = meaningful and self.momentum >= 0 and (self.momentum == 0 or self.kind == "recall")
        meaningful = meaningful and self.block >= 0 and self.representatives >= 0
        staged = (self.coarse, self.medium, self.coarse_steps, self.medium_steps, self.block_steps)
        if self.kind == "infinite-hip":
            meaningful = meaningful and min(staged) > 0 and self.coarse >= self.medium >= self.block
        else:
            meaningful = meaningful and not any(staged)
        if self.kind == "re-attention":
            meaningful = meaningful and self.votes > 0 and self.radius >= 0
        else:
            meaningful = meaningful and self.votes == 0 and self.radius == 0
        grouped, chunked = self.kind == "self-extend", self.kind == "dual-chunk"
        meaningful = meaningful and (self.neighbours > 0) == (self.group_size > 0) == grouped
        meaningful = meaningful and (0 < self.chunk < self.positions) == (self.positions > 0) == chunked
        if not meaningful:
            raise ValueError(f"no such method: {self}")

    @property
    def recalls(self) -> bool:
        """Whether groups of queries recall keys."""
        return self.kind in ("inf-llm", "re-attention", "recall", "quest", "infinite-hip")

    @property
    def local(self) -> int:
        """L, the latest keys that a query sees beside sinks and recalled keys, itself included."""
        assert self.window is not None
        return self.window - self.sinks - self.recalled


@dataclass(frozen=True)
class Rotation:
    """A model's rotary embedding in float64: rotates the first dimensions of each head, in halves.

    Parameters
    ----------
    inv_freq
        (rotated dimensions / 2,) float64.
    scaling
        What cosine and sine are multiplied by (YaRN's attention factor).
    """

    inv_freq: Tensor
    scaling: float = 1.0

    def __call__(self, x: Tensor, position: int) -> Tensor:
        """Rotate x (heads, d), float64, by a position."""
        half = len(self.inv_freq)
        first, second, untouched = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
        angle = position * self.inv_freq
        cos, sin = angle.cos() * self.scaling, angle.sin() * self.scaling
        return torch.cat((first * cos - second * sin, second * cos + first * sin, untouched), dim=1)


def places(
    spec: ReferenceSpec,
    i: int,
    j: int,
    sliding: int | None = None,
    offset: int = 0,
    recalled: Sequence[int] = (),
) -> Places | None:
    """Where query i and key j are placed for their dot product; None if i does not see j.

    Parameters
    ----------
    sliding
        The width of a local layer: such a layer keeps to its own rule, whatever the method.
    offset
        Position of the row's first token. Moves absolute positions only: places inside a cache, and the two
        places of a distance at the ceiling or of a recalled key, stay.
    recalled
        The keys that query i recalls, in order.
    """
    if j > i:
        return None
    true = (offset + i, offset + j)
    if sliding is not None:
        return true if i - j < sliding else None
    if spec.kind == "streaming-llm":
        return _place_in_cache(spec, i, j)
    if spec.recalls:
        return _place_beside_recalled(spec, i, j, recalled, true)
    if spec.kind == "self-extend" and i - j >= spec.neighbours:
        group, ahead = spec.group_size, spec.neighbours - spec.neighbours // spec.group_size
        return (i // group + ahead, j // group)
    if spec.kind == "dual-chunk":
        return _place_in_chunk(spec, i, j)
    if spec.kind == "lm-infinite" and not _in_window(spec, i, j):
        return None
    if spec.ceiling is not None and i - j > spec.ceiling:
        return (spec.ceiling, 0)
    return true


def _in_window(spec: ReferenceSpec, i: int, j: int) -> bool:
    assert spec.window is not None
    return i - j < spec.window - spec.sinks or j < spec.sinks


def _place_in_cache(spec: ReferenceSpec, i: int, j: int) -> Places | None:
    """StreamingLLM: write down the cache that query i sees, and count."""
    assert spec.window is not None
    if i < spec.window:
        cache = list(range(i + 1))
    else:
        recent = spec.window - spec.sinks
        cache = [*range(spec.sinks), *range(i - recent + 1, i + 1)]
    return (cache.index(i), cache.index(j)) if j in cache else None


def _place_beside_recalled(
    spec: ReferenceSpec, i: int, j: int, recalled: Sequence[int], true: Places
) -> Places | None:
    assert spec.window is not None
    if i < spec.window:
        return true
    latest = range(i - spec.local + 1, i + 1)
    cache = [*range(spec.sinks), *recalled, *latest]
    if j not in cache:
        return None
    if spec.kind in ("re-attention", "infinite-hip"):
        return (cache.index(i), cache.index(j))
    return true if j in latest else (spec.local - 1 if spec.distance is None else spec.distance, 0)


def _place_in_chunk(spec: ReferenceSpec, i: int, j: int) -> Places:
    """DualChunk: by how many chunks lie between the two."""
    size, last = spec.chunk, spec.positions - 1
    between = i // size - j // size
    if between == 0:
        return (i % size, j % size)
    if between == 1:
        return (min(i % size + size, last), j % size)
    return (last, j % size)


def middle_keys(spec: ReferenceSpec, layer: int, i: int) -> list[int]:
    """The keys from which query i may recall in this layer: those between the sinks and the window."""
    if spec.top_k == 0 or layer < spec.top_k_layers:
        return []
    return [j for j in range(i + 1) if not _in_window(spec, i, j)]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Rotation,
    scale: float,
    spec: ReferenceSpec,
    layer: int = 0,
    sliding: int | None = None,
    offset: int = 0,
    edges: Sequence[int] | None = None,
    before: dict[int, tuple[int, list[list[int]]]] | None = None,
) -> Tensor:
    """Attend over one row.

    Parameters
    ----------
    query
        (heads, n, d), not rotated.
    key
        (key-value heads, n, d), not rotated.
    value
        (key-value heads, n, d_value).
    rotation
        The rotary embedding of this layer.
    scale
        What dot products are multiplied by.
    spec
        The method.
    layer
        Index of the layer, from 0.
    sliding
        Width of a local layer, None for a full one.
    offset
        Position of the row's first token.
    edges
        For a method that recalls for groups of queries: where groups begin, in positions of the row, from how
        it was read. 0 first, ascending; those past the row's end count for nothing.
    before
        What earlier layers recalled, where layers recall the same; see :func:`recalled_keys`.

    Returns
    -------
    Tensor
        (heads, n, d_value) float64.
    """
    heads, length = query.shape[:2]
    group = heads // len(key)
    query, key, value = query.double(), key.double(), value.double()
    recalled: dict[int, list[list[int]]] = {}
    if spec.recalls and sliding is None:
        recalled = recalled_keys(query, key, rotation, spec, edges, offset, layer, before, scale)
    key, value = key.repeat_interleave(group, dim=0), value.repeat_interleave(group, dim=0)
    output = torch.zeros(heads, length, value.shape[2], dtype=torch.float64)

    def logit(i: int, j: int, at: Places) -> Tensor:
        return (rotation(query[:, i], at[0]) * rotation(key[:, j], at[1])).sum(dim=1) * scale

    for i in range(length):
        logits: list[list[Tensor]] = [[] for _ in range(heads)]
        values: list[list[Tensor]] = [[] for _ in range(heads)]

        for j in range(length):
            of_lists = [places(spec, i, j, sliding, offset, own) for own in recalled.get(i, [[]])]
            scores = {at: logit(i, j, at) for at in set(of_lists) if at is not None}
            for head in range(heads):
                at = of_lists[head // group if len(of_lists) > 1 else 0]  # by its key-value head's list
                if at is None:
                    continue
                logits[head].append(scores[at][head])
                values[head].append(value[head, j])

        middle = middle_keys(spec, layer, i) if sliding is None else []
        if middle:
            distance = _middle_distance(spec)
            scores_of = {j: logit(i, j, (distance, 0)) for j in middle}
            for head in range(heads):
                best = sorted(middle, key=lambda j: float(scores_of[j][head]), reverse=True)[: spec.top_k]
                logits[head] += [scores_of[j][head] for j in best]
                values[head] += [value[head, j] for j in best]

        for head in range(heads):
            weights = torch.softmax(torch.stack(logits[head]), dim=0)
            output[head, i] = weights @ torch.stack(values[head])
    return output


def _middle_distance(spec: ReferenceSpec) -> int:
    if spec.top_k_distance is not None:
        return spec.top_k_distance
    assert spec.window is not None
    return spec.window // 2
