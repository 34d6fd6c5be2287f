"""InfiniteHiP's choice: what one key-value head recalls for a group, in three stages, by definition.

Chunks of each stage are numbered from the sinks on. Only whole blocks are recalled, so only their tokens are
candidates: chunks at either end may have some of theirs alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .attention import ReferenceSpec

SHARES = 16, 4, 1
"""The tokens that each stage leaves, for each one that is recalled."""


@dataclass
class Stages:
    """What a head's stages left when they last asked, and how many single queries have used it.

    Attributes
    ----------
    uses
        Groups of one asking query in a row, up to now.
    left
        The numbers of the chunks that each stage left.
    """

    uses: int = 0
    left: list[list[int]] = field(default_factory=list)


def in_stages(
    query: Tensor, key: Tensor, spec: ReferenceSpec, asking: list[int], stages: Stages
) -> list[int]:
    """The keys, in order, that a group recalls in one key-value head.

    Parameters
    ----------
    query
        (heads that share these keys, n, d) float64, not rotated.
    key
        (n, d) float64, not rotated.
    spec
        The method's constants.
    asking
        The asking queries of the group.
    stages
        Of the group before; brought up to this one.
    """
    candidates = whole_blocks(spec, asking[0])
    if len(candidates) <= spec.recalled:
        return candidates
    steps = spec.coarse_steps, spec.medium_steps, spec.block_steps
    if len(asking) > 1 or not stages.left:
        stages.uses, stages.left = 0, []
    for stage in range(3):
        if stages.left[stage:] and stages.uses % steps[stage] != 0:
            continue
        within = candidates
        if stage:
            size = sizes(spec)[stage - 1]
            within = [j for j in candidates if chunk_of(spec, j, size) in stages.left[stage - 1]]
        chosen = best_chunks(query, key, spec, asking, within, stage)
        stages.left[stage:] = [chosen]  # later stages ask anew
    stages.uses += 1
    recalled = [j for j in candidates if chunk_of(spec, j, spec.block) in stages.left[2]]
    if len(asking) > 1:
        stages.uses, stages.left = 0, []
    return recalled


def sizes(spec: ReferenceSpec) -> tuple[int, int, int]:
    """The tokens of a chunk in each stage."""
    return spec.coarse, spec.medium, spec.block


def chunk_of(spec: ReferenceSpec, token: int, size: int) -> int:
    """The number of the chunk of this size in which a token lies."""
    return (token - spec.sinks) // size


def whole_blocks(spec: ReferenceSpec, first: int) -> list[int]:
    """The tokens of the blocks that all lie behind the sinks and before what query `first` sees anyway."""
    tokens: list[int] = []
    begin = spec.sinks
    while first - (begin + spec.block - 1) >= spec.local:
        tokens += range(begin, begin + spec.block)
        begin += spec.block
    return tokens


def best_chunks(
    query: Tensor, key: Tensor, spec: ReferenceSpec, asking: list[int], within: list[int], stage: int
) -> list[int]:
    """The numbers of the chunks that a stage leaves of these tokens: the best whole ones, and the others."""
    size = sizes(spec)[stage]
    tokens_of: dict[int, list[int]] = {}
    for j in within:
        tokens_of.setdefault(chunk_of(spec, j, size), []).append(j)
    others = [number for number, tokens in tokens_of.items() if len(tokens) < size]
    worth = {
        number: token_worth(query, key, asking, descend(query, key, asking, tokens))
        for number, tokens in tokens_of.items()
        if len(tokens) == size
    }
    most = max(1, SHARES[stage] * spec.recalled // size)
    return sorted([*others, *sorted(worth, key=lambda number: (-worth[number], number))[:most]])


def descend(query: Tensor, key: Tensor, asking: list[int], tokens: list[int]) -> int:
    """The token that is left when the better half is kept again and again, judged by its first token."""
    while len(tokens) > 1:
        earlier, later = tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
        is_later_better = token_worth(query, key, asking, later[0]) > token_worth(
            query, key, asking, earlier[0]
        )
        tokens = later if is_later_better else earlier
    return tokens[0]


def token_worth(query: Tensor, key: Tensor, asking: list[int], token: int) -> float:
    """The product of a token's key with the mean asking query, added up over the heads that share it."""
    return sum(float(query[head, asking].mean(dim=0) @ key[token]) for head in range(len(query)))
