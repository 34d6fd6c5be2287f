"""Streams that begin with keys and values that no text made: a trained prefix."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from everlong.attention.cache import StreamCache
from everlong.attention.forward import Layers
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
    assert prefix.keys() == layers.kept.keys()
    (length,) = {keys.shape[2] for keys, _ in prefix.values()}
    cache = StreamCache(with_sinks(policy, length), layers.kept, owner, tier=tier)
    for number, rotation in layers.rotations(cache.policy, length).items():
        cache.memories[number].begin_with(*prefix[number], rotation)
    cache.rows, cache.seen = 1, length
    return cache
