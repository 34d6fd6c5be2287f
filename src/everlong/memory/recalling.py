"""Memories of a store on a model: checked, combined, and put in as one adapter."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence

from everlong.errors import ConfigurationError
from everlong.memory.adapter import Adapter
from everlong.memory.cartridge import WEIGHTS, prefix_of
from everlong.memory.combine import combine
from everlong.memory.folder import Memory
from everlong.memory.store import MemoryStore
from everlong.reading.attached import AttachedModel
from everlong.reading.memories import Memories


def recall_memories(
    model: AttachedModel,
    memories: Sequence[str | Memory],
    weights: Sequence[float] | None,
    store: MemoryStore,
) -> Memories:
    """Put memories on a model, for sessions to use.

    Parameters
    ----------
    model : AttachedModel
        The model they were learned by.
    memories : sequence of str or Memory
        At least one; names are looked up in `store`.
    weights : sequence of float, optional
        By how much each counts; 1 by default. Several are combined exactly up to rank 128.
    store : MemoryStore
        Where names are looked up.

    Raises
    ------
    UnknownNameError
        There is no memory of that name.
    ConfigurationError
        A memory is of another base model, or of a kind that cannot be used so.
    """
    if isinstance(memories, str) or not memories:
        raise ConfigurationError("memories is a list of at least one name, such as ['handbook'], or 'auto'")
    found = [store.get(memory) if isinstance(memory, str) else memory for memory in memories]
    shares = [1.0] * len(found) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(found):
        raise ConfigurationError(f"{len(found)} memories need as many weights, not {len(shares)}")
    base_hash = model.weights_hash
    for memory in found:
        if memory.record.base_hash != base_hash:
            raise ConfigurationError(foreign(memory, model.name))
        if memory.record.kind == "cartridge" and (len(found) > 1 or shares != [1.0]):
            raise ConfigurationError(
                f"memory {memory.name!r} is a cartridge: it is used alone, with no other and no weight"
            )
    names = [memory.name for memory in found]
    adapters = [memory.adapter() for memory in found]
    together: Adapter = adapters[0]
    if len(found) > 1 or shares != [1.0]:
        together = combine(adapters, shares).told("memories " + ", ".join(names))
    called = adapter_name("", list(zip(adapters, shares, strict=True)))
    if found[0].record.kind == "cartridge":
        return Memories(tuple(names), tuple(shares), called, prefix_of(model, together.tensors[WEIGHTS]))
    return put_on(model, names, shares, together, called)


def foreign(memory: Memory, name: str) -> str:
    """Say that a memory is none of the model called `name`, and what to do."""
    return (
        f"memory {memory.name!r} was learned by {memory.record.base_model!r}, with other weights "
        f"than those of {name!r} here: load that model, or learn the text again"
    )


def put_on(
    model: AttachedModel, names: Sequence[str], weights: Sequence[float], adapter: Adapter, name: str
) -> Memories:
    """Put an adapter on a model for as long as somebody holds what is returned.

    Parameters
    ----------
    model : AttachedModel
        The model.
    names, weights : sequence
        Of the memories that it was made of.
    adapter : Adapter
        All of them.
    name : str
        What it is called there; see :func:`adapter_name`.
    """
    adapters = model.attachment.adapters
    adapters.load(name, adapter.config, adapter.tensors)
    memories = Memories(tuple(names), tuple(weights), name)
    weakref.finalize(memories, adapters.release, name).atexit = False
    return memories


def adapter_name(before: str, parts: Sequence[tuple[Adapter, float]]) -> str:
    """Return what the adapter is called that is made of one called `before` ("": none) and of others."""
    name = before
    for adapter, weight in parts:
        digest = hashlib.sha256(f"{name} {weight}".encode())
        for key, tensor in sorted(adapter.tensors.items()):
            digest.update(key.encode())
            digest.update(tensor.float().contiguous().numpy().tobytes())
        name = f"memory-{digest.hexdigest()[:16]}"
    return name
