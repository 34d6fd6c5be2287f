"""Several memories as one: their adapters combined, their records and pairs put together."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from everlong.errors import ConfigurationError
from everlong.memory.adapter import Adapter
from everlong.memory.combine import combine
from everlong.memory.folder import Memory
from everlong.memory.pairs import Pair
from everlong.memory.record import MemoryRecord, Recipe, Source

RECIPE = "merge"
"""Name of the recipe in the record of a merged memory."""


def merged(
    memories: Sequence[Memory], name: str, weights: Sequence[float] | None = None
) -> tuple[MemoryRecord, Adapter, list[Pair]]:
    """Combine memories into the parts of a new one.

    Parameters
    ----------
    memories : sequence of Memory
        LoRA memories of one base model, at least two.
    name : str
        What the new one is called.
    weights : sequence of float, optional
        What each one's effect is multiplied with; 1 by default.

    Returns
    -------
    record : MemoryRecord
        Its source is that of all: lengths are added, and the hash is that of the hashes in their order.
    adapter : Adapter
        As :func:`everlong.memory.combine.combine` makes it.
    pairs : list of Pair
        All pairs, their segments numbered on.

    Raises
    ------
    ConfigurationError
        If they are fewer than two, of different base models, or one is a cartridge.
    """
    _require_mergeable(memories)
    combination = combine([memory.adapter() for memory in memories], weights)
    records = [memory.record for memory in memories]
    pairs, segments = [], 0
    for memory in memories:
        pairs += [dataclasses.replace(pair, segment=pair.segment + segments) for pair in memory.pairs()]
        segments += memory.record.segments
    values = {
        "memories": [record.name for record in records],
        "weights": [1.0] * len(records) if weights is None else list(weights),
        "method": combination.method,
        "error": combination.error,
    }
    record = MemoryRecord(
        name,
        base_model=records[0].base_model,
        base_hash=records[0].base_hash,
        source=Source(
            hashlib.sha256("".join(record.source.sha256 for record in records).encode()).hexdigest(),
            sum(record.source.characters for record in records),
            sum(record.source.tokens for record in records),
        ),
        segments=segments,
        recipe=Recipe(RECIPE, values),
        rank=combination.rank,
        seconds=sum(record.seconds for record in records),
    )
    return record, combination.adapter, pairs


def _require_mergeable(memories: Sequence[Memory]) -> None:
    if len({memory.name for memory in memories}) < max(len(memories), 2):
        raise ConfigurationError("merging takes two memories or more, each of them once")
    for memory in memories:
        if memory.record.kind != "lora":
            raise ConfigurationError(
                f"memory {memory.name!r} is a {memory.record.kind}, which cannot be merged: leave it out"
            )
    first, *others = memories
    for other in others:
        if other.record.base_hash != first.record.base_hash:
            same = other.record.base_model == first.record.base_model
            raise ConfigurationError(
                f"memory {first.name!r} was learned by {first.record.base_model} and {other.name!r} by "
                f"{'other weights of it' if same else other.record.base_model}: only memories of one base "
                f"model can be merged"
            )
