"""SirLLM: the tokens that surprised the model, and the latest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from everlong.attention.cache import StreamCache
from everlong.attention.choosing import StreamChoosingPolicy
from everlong.attention.kept import KeptMemory
from everlong.attention.kept_view import AT, SCORE, KeptView
from everlong.attention.policy import POLICIES, require_share

_UNKNOWN = 1e6  # nats: more than any token surprises


@dataclass(frozen=True)
class SurprisalPolicy(StreamChoosingPolicy):
    """Told the surprisal of tokens, and keeps it as their score, the same in all layers and heads."""

    needs_surprisal: ClassVar[bool] = True
    in_cache: ClassVar[bool] = True

    def worth(self, slots: Tensor, can_go: Tensor, view: KeptView) -> Tensor:
        """Return tokens' surprisal; that of the forward's own is not known: more, and most for the latest."""
        new = view.at.gather(2, slots) - view.memory.seen
        return torch.where(new >= 0, _UNKNOWN + new.float(), view.score.gather(2, slots))

    def after_forward(self, cache: StreamCache, tokens: Tensor, surprisal: Tensor | None) -> None:
        """Note the surprisal of the tokens that are held."""
        assert surprisal is not None, "sessions report it"
        for memory in cache.memories.values():
            if isinstance(memory, KeptMemory):
                at, score = memory.index[AT], memory.index[SCORE]
                number = at - (cache.seen - tokens.shape[1])
                new = surprisal.to(score.device, score.dtype)[:, None].expand(*score.shape[:2], -1)
                memory.note(at, torch.where(number >= 0, new.gather(2, number.clamp(min=0)), score))


@POLICIES.register("sir-llm")
@dataclass(frozen=True)
class SirLLM(SurprisalPolicy):
    """SirLLM: Streaming Infinite Retentive LLM (Yao et al., ACL 2024, arXiv 2405.12528).

    What is kept: `sinks` first tokens, the latest `recent`, and of those between them the ones that surprised
    the model most when it read them, -log p(token | what was kept); the same in all layers and heads. What a
    query sees: all of these. At which positions: their place among those kept, as in StreamingLLM. What is
    forgotten: before each token is written, the least surprising one, for good; in prefill, before each group
    of queries, as many as it needs room for.

    The surprisal of a token is known when the forward that read it has ended. A chunk that does not fit
    beside what is held therefore drops its own tokens as StreamingLLM does, the earliest first, once nothing
    else can be dropped; so results depend on the chunks in which a text is read.

    Parameters
    ----------
    sinks : int
        G, first tokens kept; 4 in the paper.
    window : int, optional
        W, all keys a query sees, itself and the sinks included; the model's training length by default.
    recent : int, optional
        Latest tokens kept whatever their surprisal; by default half of ``window - sinks``.
    group : int, optional
        Queries that attend between two choices in prefill; while writing each alone. By default 64, or half
        of `recent` where that is less.
    decay : float
        Factor on what has been told of all tokens each time the model begins to write, in (0, 1]: once per
        turn of a conversation. The paper has 1, 0.9 and 0.7; 1: old turns count as much as new ones.
    """

    sinks: int = 4
    window: int | None = None
    recent: int | None = None
    group: int | None = None
    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share("SirLLM", "decay", self.decay)

    def end_of_prefill(self, cache: StreamCache) -> None:
        """Let what was told so far count less from here on: a turn has been read."""
        for memory in cache.memories.values():
            if isinstance(memory, KeptMemory) and self.decay != 1:
                memory.note(memory.index[AT], memory.index[SCORE] * self.decay)
