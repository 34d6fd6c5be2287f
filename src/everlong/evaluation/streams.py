"""A stream of tokens through a model, under a policy or as the model is, read the same way."""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from everlong.attention import Attachment, Policy, Tier, attach, policy_options
from everlong.errors import UnknownNameError
from everlong.models.anatomy import decoder_of
from everlong.models.cache_argument import cache_argument


class Stream(ABC):
    """Tokens read one chunk after another; the head is left to the caller.

    Attributes
    ----------
    decoder : nn.Module
        The model without its head.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder = decoder

    @property
    @abstractmethod
    def cache(self) -> Any:
        """What the model remembers."""

    @torch.inference_mode()
    def read(self, ids: Tensor, *, undisturbed: bool = False) -> Tensor:
        """Read tokens.

        Parameters
        ----------
        ids : Tensor (n,)
            The tokens.
        undisturbed : bool
            Whether nothing but Everlong's own code has run since the ones before; see
            :meth:`~everlong.attention.Attachment.step`.

        Returns
        -------
        Tensor (n, d)
            The hidden states after them.
        """
        call = {"input_ids": ids[None], cache_argument(self.decoder): self.cache, "use_cache": True}
        output = self.decoder(**call)
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    @property
    def wants_surprisal(self) -> bool:
        """Whether the method goes by what it is told."""
        return False

    def told(self, ids: Tensor, surprisal: Tensor) -> None:  # noqa: B027 most have no use for it
        """Take note of what was read, ids and surprisal in nats of shape (n,), where the method wants it."""

    def end_reading(self) -> None:  # noqa: B027
        """Take note that writing begins."""

    @abstractmethod
    def bytes(self) -> dict[str, int]:
        """Bytes held, by tier."""

    @property
    @abstractmethod
    def seen(self) -> int:
        """Tokens read."""

    @property
    @abstractmethod
    def kept(self) -> int:
        """Tokens the next one can see."""

    def described(self) -> tuple[str | None, dict[str, Any]]:
        """Return the policy's registered name, if it has one, and its options."""
        return None, {}

    @property
    def forgotten(self) -> int:
        """Tokens lost for good."""
        return 0


class StockStream(Stream):
    """The model as it is, with transformers' own growing cache."""

    def __init__(self, model: nn.Module) -> None:
        decoder = decoder_of(model)
        super().__init__(decoder)
        self._cache = DynamicCache(config=_config_of(decoder))

    @property
    def cache(self) -> DynamicCache:
        """Transformers' cache."""
        return self._cache

    @property
    def layers(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values of each layer that holds any, by its number."""
        layers: list[Any] = list(self._cache.layers)
        return {
            number: (layer.keys, layer.values)
            for number, layer in enumerate(layers)
            if layer.is_initialized and layer.keys is not None  # layers that share others' have none
        }

    def bytes(self) -> dict[str, int]:
        """Bytes of all keys and values."""
        return {"window": sum(keys.nbytes + values.nbytes for keys, values in self.layers.values())}

    @property
    def seen(self) -> int:
        """Tokens read."""
        return int(self._cache.get_seq_length())

    @property
    def kept(self) -> int:
        """All of them."""
        return self.seen


class PolicyStream(Stream):
    """A stream of an attached model."""

    def __init__(self, attachment: Attachment) -> None:
        super().__init__(attachment.decoder)
        self._attachment = attachment
        self._cache = attachment.new_cache()

    @torch.inference_mode()
    def read(self, ids: Tensor, *, undisturbed: bool = False) -> Tensor:
        """Read tokens; a single one as a session does that writes."""
        if len(ids) > 1:
            return super().read(ids)
        return self._attachment.step(self._cache, ids[None], hidden=True, undisturbed=undisturbed)[0]

    @property
    def cache(self) -> Any:
        """The attachment's cache."""
        return self._cache

    @property
    def wants_surprisal(self) -> bool:
        """Whether the policy does."""
        return self._cache.needs_surprisal

    def told(self, ids: Tensor, surprisal: Tensor) -> None:
        """Tell the policy."""
        self._cache.after_forward(ids[None], surprisal[None])

    def end_reading(self) -> None:
        """Tell the policy."""
        self._cache.end_of_prefill()

    def bytes(self) -> dict[str, int]:
        """As the cache accounts for them."""
        return self._cache.bytes()

    @property
    def seen(self) -> int:
        """Tokens read."""
        return self._cache.seen

    @property
    def settles_at(self) -> int | None:
        """Tokens after which the stream holds no more and costs the same; None: it grows."""
        policy: Policy = self._cache.policy
        return policy.span if policy.forgets else None

    def fork(self) -> PolicyStream:
        """Return an independent copy."""
        other = copy.copy(self)
        other._cache = self._cache.fork()
        return other

    def described(self) -> tuple[str | None, dict[str, Any]]:
        """As the policy is registered."""
        try:
            return policy_options(self._cache.policy)
        except UnknownNameError:  # a policy of one's own that has no name
            return None, dataclasses.asdict(self._cache.policy)

    @property
    def kept(self) -> int:
        """Tokens in the window or recallable."""
        return self._cache.kept + self._cache.recallable

    @property
    def forgotten(self) -> int:
        """Tokens no layer holds any more."""
        return self._cache.forgotten


@contextmanager
def open_stream(model: nn.Module, policy: Policy | None, *, tier: Tier | None = None) -> Iterator[Stream]:
    """Open a stream under `policy`; None: the detached model.

    Parameters
    ----------
    model : nn.Module
        A detached causal language model; it is detached again at the end.
    policy : Policy or None
        What its attention follows.
    tier : Tier, optional
        Where what leaves the window goes, where the policy keeps it; see :func:`~everlong.attention.attach`.
    """
    if policy is None:
        yield StockStream(model)
        return
    with attach(model, policy, tier=tier) as attachment:
        yield PolicyStream(attachment)


def _config_of(decoder: Any) -> Any:
    return decoder.config
