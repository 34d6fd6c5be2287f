"""Which keys a query recalls, where queries recall in groups.

InfLLM, ReAttention, Recall, Quest and InfiniteHiP, by definition. Queries from the window on ask; the asking
queries of a group recall the same keys, those of all query heads together (for Quest and InfiniteHiP: of all
that share a key-value head), once in each layer. What can be recalled is what the first of them does not see
anyway. Under Recall, queries that come one by one see what the first of some of them recalled, and for that
one it counts, too, what blocks were given before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .infinite_hip import Stages, in_stages

if TYPE_CHECKING:
    from .attention import ReferenceSpec, Rotation


def recalled_keys(
    query: Tensor,
    key: Tensor,
    rotation: Rotation,
    spec: ReferenceSpec,
    edges: Sequence[int] | None,
    offset: int = 0,
    layer: int = 0,
    before: dict[int, tuple[int, list[list[int]]]] | None = None,
    scaling: float = 1.0,
) -> dict[int, list[list[int]]]:
    """The keys that each asking query recalls, in the order of the row.

    A list for each key-value head, or a single one for all of them.

    Parameters
    ----------
    query
        (heads, n, d) float64, not rotated.
    key
        (key-value heads, n, d) float64, not rotated.
    rotation
        The rotary embedding of this layer.
    spec
        A method that recalls for groups.
    edges
        Where groups begin, in positions of the row: 0 first, ascending. May be None where no query asks.
    offset
        Position of the row's first token.
    layer
        Index of the layer.
    before
        For Recall, where layers share: which layer asked last and what it recalled, for each group by its
        first asking query. What this layer recalls is written into it.

    Raises
    ------
    ValueError
        If there are no edges though queries ask, or the edges do not begin at 0 or do not ascend.
    """
    found: dict[int, list[list[int]]] = {}
    standing: list[list[int]] = []
    written = None  # the query that last asked alone
    stages: list[Stages] = [Stages() for _ in key]
    earlier: dict[int, float] = {}  # what blocks were given last
    for asking in asking_groups(spec, query.shape[1], edges):
        is_alone = {asking[0], asking[0] + 1} <= {*(edges or ()), query.shape[1]}
        if is_alone and written is not None and asking[0] - written < spec.steps:
            found[asking[0]] = standing
            continue
        written = asking[0] if is_alone else None
        asked, recalled = (before or {}).get(asking[0], (layer - spec.layers, []))
        if layer >= asked + spec.layers:
            if spec.kind == "inf-llm":
                recalled = [_best_blocks(query, key, rotation, spec, asking, offset)]
            elif spec.kind == "recall":
                if not is_alone:
                    earlier.clear()
                recalled = [_best_blocks(query, key, rotation, spec, asking, offset, scaling, earlier)]
            elif spec.kind == "quest":
                heads_each = len(query) // len(key)
                recalled = [
                    _best_blocks(query[heads_each * h :][:heads_each], key[h : h + 1], rotation, spec, asking)
                    for h in range(len(key))
                ]
            elif spec.kind == "infinite-hip":
                heads_each = len(query) // len(key)
                recalled = [
                    in_stages(query[heads_each * h :][:heads_each], key[h], spec, asking, stages[h])
                    for h in range(len(key))
                ]
            else:
                recalled = [_most_voted(query, key, spec, asking)]
            if before is not None:
                before[asking[0]] = layer, recalled
        standing = recalled
        for i in asking:
            found[i] = recalled
    return found


def asking_groups(spec: ReferenceSpec, length: int, edges: Sequence[int] | None) -> list[list[int]]:
    """The asking queries of each group that has any."""
    assert spec.window is not None
    if edges is None:
        if length > spec.window:
            raise ValueError(f"{spec.kind} recalls for groups of queries, and no edges of groups are given")
        return []
    if list(edges[:1]) != [0] or list(edges) != sorted(set(edges)):
        raise ValueError(f"edges of groups begin at 0 and ascend, unlike {list(edges)}")
    groups = [
        [i for i in range(begin, min(end, length)) if i >= spec.window]
        for begin, end in pairwise([*edges, length])
    ]
    return [asking for asking in groups if asking]


def recallable(spec: ReferenceSpec, asking: list[int]) -> list[int]:
    """The keys that a group can recall: behind the sinks, and before what its first asking query sees."""
    first = asking[0]
    return [j for j in range(first) if j >= spec.sinks and first - j >= spec.local]


# InfLLM: whole blocks, by the products of their representatives with the mean query.


def block_tokens(spec: ReferenceSpec, block: int) -> list[int]:
    """The tokens of a block; the first block, 0, begins behind the sinks."""
    start = spec.sinks + block * spec.block
    return list(range(start, start + spec.block))


def _best_blocks(
    query: Tensor,
    key: Tensor,
    rotation: Rotation,
    spec: ReferenceSpec,
    asking: list[int],
    offset: int = 0,
    scaling: float = 1.0,
    earlier: dict[int, float] | None = None,
) -> list[int]:
    within = recallable(spec, asking)
    candidates: list[int] = []
    given: dict[int, float] = {}
    while all(j in within for j in block_tokens(spec, len(candidates))):
        candidates.append(len(candidates))
    best = candidates
    count = spec.recalled // spec.block
    if len(candidates) > count:
        worth = {}
        if spec.kind == "recall":
            given = given_to_blocks(query, key, asking, spec, candidates, scaling)
            for block, before in (earlier or {}).items():
                given[block] += spec.momentum * before
            if earlier is not None:
                earlier.update(given)
        for block in candidates:
            if spec.kind == "recall":
                worth[block] = given[block]
                continue
            if spec.kind == "quest":
                worth[block] = bound(query, key[0], rotation, spec, asking, block_tokens(spec, block))
                continue
            representatives = block_representatives(query, key, rotation, spec, block, offset)
            worth[block] = block_worth(query, rotation, spec, asking, representatives)
        best = _largest(worth, count)
    return [j for block in sorted(best) for j in block_tokens(spec, block)]


def block_representatives(
    query: Tensor, key: Tensor, rotation: Rotation, spec: ReferenceSpec, block: int, offset: int = 0
) -> Tensor:
    """The mean of the keys of a block that get most from the queries after it: (key-value heads, d).

    Those are the queries of the next (L - 1) // B blocks. Without any, the first keys stand for the block.
    """
    following = [
        i
        for later in range(block + 1, block + 1 + (spec.local - 1) // spec.block)
        for i in block_tokens(spec, later)
    ]
    queries = {i: rotation(query[:, i], offset + i) for i in following}
    keys = {p: rotation(key[:, p], offset + p) for p in block_tokens(spec, block)}
    heads_each = len(query) // len(key)
    means = []
    for kv_head in range(len(key)):
        heads = range(kv_head * heads_each, (kv_head + 1) * heads_each)
        received = dict.fromkeys(keys, 0.0)
        for p in keys:
            for i in following:
                for head in heads:
                    received[p] += float(queries[i][head] @ keys[p][kv_head])
        most = _largest(received, spec.representatives)
        means.append(torch.stack([key[kv_head, p] for p in most]).mean(dim=0))
    return torch.stack(means)


def block_worth(
    query: Tensor, rotation: Rotation, spec: ReferenceSpec, asking: list[int], representatives: Tensor
) -> float:
    """What a block with these representatives (key-value heads, d) is worth to a group."""
    rotated = [rotation(query[:, i], spec.local - 1) for i in asking]
    mean = torch.stack(rotated).mean(dim=0)
    heads_each = len(query) // len(representatives)
    return sum(float(mean[head] @ representatives[head // heads_each]) for head in range(len(query)))


# Recall: whole blocks too, by the softmax over blocks of the logit of the best key, of each head that asks;
# the last keys of the block before count, too.


def given_to_blocks(
    query: Tensor, key: Tensor, asking: list[int], spec: ReferenceSpec, blocks: list[int], scaling: float
) -> dict[int, float]:
    """What all heads of the last asking queries, and of the mean of those before, give each block."""
    alone = asking[max(0, len(asking) - spec.probes + 1) :]
    rest = [i for i in asking if i not in alone]
    if len(rest) == 1:
        alone, rest = asking, []
    asked = [query[:, i] for i in alone] + ([query[:, rest].mean(dim=1)] if rest else [])
    heads_each = len(query) // len(key)
    given = dict.fromkeys(blocks, 0.0)
    judged_by = {block: block_tokens(spec, block) for block in blocks}
    for block in blocks[1:]:
        start = judged_by[block][0]
        judged_by[block] = [*range(start - spec.lead, start), *judged_by[block]]
    for one in asked:
        for head in range(len(query)):
            best = {
                block: max(scaling * float(one[head] @ key[head // heads_each, p]) for p in judged_by[block])
                for block in blocks
            }
            total = sum(math.exp(logit) for logit in best.values())
            for block in blocks:
                given[block] += math.exp(best[block]) / total
    return given


# Quest: whole blocks, for each key-value head by the least and the largest its keys are in each channel.


def bound(
    query: Tensor, key: Tensor, rotation: Rotation, spec: ReferenceSpec, asking: list[int], tokens: list[int]
) -> float:
    """How large the products of a head's keys (n, d) with its query heads can be, summed over these.

    Of keys at 0 and the mean of the asking queries at L - 1, by what is known of the keys channel by channel.
    """
    mean = torch.stack([rotation(query[:, i], spec.local - 1) for i in asking]).mean(dim=0)
    total = 0.0
    for head in mean.tolist():
        for channel, number in enumerate(head):
            keys = [float(key[token, channel]) for token in tokens]
            total += max(number * min(keys), number * max(keys))
    return total


# ReAttention: the keys with most votes, and their neighbours.


def _most_voted(query: Tensor, key: Tensor, spec: ReferenceSpec, asking: list[int]) -> list[int]:
    within = recallable(spec, asking)
    heads_each = len(query) // len(key)
    votes = dict.fromkeys(within, 0)
    for i in asking:
        for head in range(len(query)):
            products = {j: float(query[head, i] @ key[head // heads_each, j]) for j in within}
            for j in _largest(products, spec.votes):
                votes[j] += 1
    voted = {j: float(number) for j, number in votes.items() if number > 0}
    chosen = _largest(voted, spec.recalled // (2 * spec.radius + 1))
    return [j for j in within if any(abs(j - middle) <= spec.radius for middle in chosen)]


def _largest(numbers: dict[int, float], count: int) -> list[int]:
    """The tokens or blocks with the largest numbers; of equal ones the earlier comes first."""
    return sorted(numbers, key=lambda one: (-numbers[one], one))[:count]
