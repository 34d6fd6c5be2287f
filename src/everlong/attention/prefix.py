"""Streams that begin with keys and values that no text made: a trained prefix."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from everlong.attention.cache import StreamCache
from everlong.attention.forward import Layers
from everlong.attention.full import FullAttention
from everlong.attention.layer_memory import LayerMemory
from everlong.attention.policy import Policy, with_sinks
from everlong.attention.tiers import Tier
from everlong.errors import UnsupportedUseError

Prefix = Mapping[int, tuple[Tensor, Tensor]]
"""Keys and values by the number of each layer with keys of its own, (1, key-value heads, n, d) each; keys
stand rotated at positions 0 to n - 1."""


def begun_with(
    prefix: Prefix, policy: Policy, layers: Layers, owner: str, tier: Tier | None = None
) -> StreamCache:
    """Return a cache that holds a prefix as its first tokens, which the policy never forgets.

    Parameters
    ----------
    prefix : Prefix
        Gradients flow into it where they are wanted, until something settles behind it.
    policy : Policy
        A resolved one.
    layers : Layers
        The model's.
    owner : str
        The attachment.
    tier : Tier, optional
        Where what leaves the window goes, as of :class:`StreamCache`.

    Raises
    ------
    ConfigurationError
        The prefix leaves no room in the policy's window.
    UnsupportedUseError
        The policy keeps no first tokens, or the model's rotation depends on the length of its input.
    """
    if layers.tables_change(policy):
        raise UnsupportedUseError(
            "this model's rotation depends on the length of its input: the keys of a prefix fit one length"
        )
    own = layers.rotations(FullAttention(), 1)
    for number, rotation in layers.rotations(policy, 1).items():
        table, other = rotation.frequencies, own[number].frequencies
        if table is not None and other is not None and not table.same_as(other):
            raise UnsupportedUseError(
                f"{type(policy).__name__} rotates by another table than the keys of a prefix are rotated by: "
                "use a policy that keeps the model's, such as LMInfinite"
            )
    assert prefix.keys() == layers.kept.keys()
    (length,) = {keys.shape[2] for keys, _ in prefix.values()}
    cache = StreamCache(with_sinks(policy, length), layers.kept, owner, tier=tier)
    for number, rotation in layers.rotations(cache.policy, length).items():
        memory = cache.memories[number]
        is_trained = any(x.requires_grad for x in prefix[number])
        if is_trained and type(memory).rotated is not LayerMemory.rotated:
            raise UnsupportedUseError(
                f"a prefix cannot be trained under {type(policy).__name__}, which places keys otherwise: "
                "train it under FullAttention or LMInfinite"
            )
        memory.begin_with(*prefix[number], rotation)
    cache.rows, cache.seen = 1, length
    return cache
