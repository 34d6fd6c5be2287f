"""Budgets in bytes, which become tokens once it is known what a token of the model takes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from everlong.attention.cache import StreamCache
from everlong.attention.full import FullAttention
from everlong.attention.layer_memory import LayerMemory
from everlong.attention.policy import Bytes, Policy
from everlong.attention.positions import Rotation
from everlong.attention.view import LayerCall
from everlong.errors import ConfigurationError
from everlong.models.files import human_bytes

if TYPE_CHECKING:
    from everlong.attention.attach import Attachment

_FIELDS = ("window", "budget")
_FAR = 2**40  # tokens: all that has an end has come to it


def resolved(policy: Policy, attachment: Attachment) -> Policy:
    """Return a policy with what depends on the model filled in, and its budgets in tokens.

    Parameters
    ----------
    policy : Policy
        Where a budget of it is in bytes, the model runs a token, to see what it takes.
    attachment : Attachment
        Of the model.

    Raises
    ------
    ConfigurationError
        The least that the policy can work with takes more bytes, or it holds all it reads.
    UnsupportedUseError
        It does not suit the model.
    """
    given = {name: getattr(policy, name, None) for name in _FIELDS}
    limits = {name: limit for name, limit in given.items() if isinstance(limit, Bytes)}
    if limits:
        measure = _Measure(attachment)
        for name, limit in limits.items():
            policy = _in_tokens(policy, name, limit, measure)
    policy = policy.resolve(attachment.training_length)
    attachment.layers.check(policy)
    return policy


def _in_tokens(policy: Policy, name: str, limit: int, measure: _Measure) -> Policy:
    """Return the policy with one of its budgets in tokens: the most that fit."""
    owner = type(policy).__name__

    def held(count: int) -> int | None:
        """Bytes with so many tokens; None: the policy cannot work with so few."""
        try:
            return measure(dataclasses.replace(policy, **{name: count}), count if name == "budget" else _FAR)
        except ConfigurationError:
            return None

    room = limit // measure.a_token
    above = room + 1  # tokens that take more, whatever comes with them
    below, fits, least = 0, 0, held(above)
    if least is not None and least > _FAR:
        raise ConfigurationError(f"{owner} holds all it reads: give its {name} in tokens")
    while below + 1 < above:
        middle = (below + above) // 2
        found = held(middle)
        if found is not None and found > limit:
            above, least = middle, found
        else:  # it fits, or the policy needs more
            below, fits = middle, fits if found is None else middle
    if not fits:
        why = f"{room:,} tokens are too few" if least is None else f"it takes {human_bytes(least)} at least"
        raise ConfigurationError(
            f"{owner}: its {name} does not fit into {human_bytes(limit)} with this model: {why}"
        )
    return dataclasses.replace(policy, **{name: fits})


class _Measure:
    """Tells what a stream holds at hand.

    Attributes
    ----------
    a_token : int
        Bytes of one token's keys and values, in the layers that follow a policy.
    """

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        cache = self._new_cache(FullAttention())
        decoder: Any = attachment.decoder
        token = torch.zeros((1, 1), dtype=torch.long, device=decoder.get_input_embeddings().weight.device)
        with torch.no_grad():
            decoder(input_ids=token, use_cache=True, **{attachment.cache_argument: cache})
        self._token = {number: _first(memory) for number, memory in cache.memories.items()}
        layers = attachment.layers
        full = [self._token[number] for number in layers.full if number in self._token]
        self.a_token = sum(key.nbytes + value.nbytes for key, value in full)

    def __call__(self, policy: Policy, tokens: int) -> int:
        """Return the bytes under a policy once so many tokens were seen."""
        cache = self._new_cache(policy)
        total = 0
        for number, memory in cache.memories.items():
            call = LayerCall(number, Rotation(None, "halves"))
            memory.settle(memory.append(*self._token[number], call))
            for held in (memory.nbytes_at(tokens), cache.policy.nbytes_beside(number, tokens, memory)):
                total += held.get("window", 0)
        return total

    def _new_cache(self, policy: Policy) -> StreamCache:
        """Return an empty cache; its tier is never filled, wherever that of others is."""
        of = self._attachment
        return StreamCache(policy.resolve(of.training_length), of.layers.kept, of.owner)


def _first(memory: LayerMemory) -> tuple[Tensor, Tensor]:
    """Return the first token's key and value."""
    assert memory.keys is not None and memory.values is not None
    return memory.keys[:, :, :1], memory.values[:, :, :1]
