"""InfiniPot: a pot that is boiled down whenever it is full."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from everlong.attention.kept_view import KeptView
from everlong.attention.policy import POLICIES, require_count
from everlong.attention.received import QUERIES, SINK_LOGITS, Weighing, note_queries, weigh
from everlong.attention.sir_llm import SurprisalPolicy
from everlong.attention.view import LayerView, Queries
from everlong.errors import ConfigurationError

_GROUP = 64


@POLICIES.register("infini-pot")
@dataclass(frozen=True)
class InfiniPot(SurprisalPolicy):
    """InfiniPot: Infinite Context Processing on Memory-Constrained LLMs (arXiv 2410.01518, EMNLP 2024).

    What is kept: a pot of up to `window` tokens in each layer, row and key-value head. Whenever a group of
    queries finds no room, the pot is compressed to `compressed` tokens: sinks, the latest `recent`, then
    those that received most attention from these latest, then those that surprised the model most. What a
    query sees: the pot. At which positions: their place in it, which begins anew with each compression. What
    is forgotten: the rest, for good.

    The paper lets a prompt, the catalyst, be read after the pot and weighs by its attention; neither its text
    nor how the two scores are mixed is published. Here no prompt is run: the latest tokens take its place, as
    in SnapKV, and half of what can be chosen goes by attention, the other half by surprisal. So this is the
    paper's pot with scores of our own, and no measure of the paper.

    The surprisal of a token is known when the forward that read it has ended; in a pot that is compressed
    before, the tokens of this very forward count as the most surprising. So results depend on the chunks in
    which a text is read.

    Parameters
    ----------
    sinks : int
        G, first tokens kept.
    window : int, optional
        W, all keys a query sees, itself included: the pot's size; the model's training length by default.
    compressed : int, optional
        Tokens that a compression leaves; by default half of the window.
    recent : int
        Latest tokens kept by a compression, whose attention is the catalyst's.
    group : int, optional
        Queries that attend together in prefill, between two looks at whether there is room. By default 64, or
        what there is room for after a compression where that is less.
    """

    sinks: int = 4
    window: int | None = None
    compressed: int | None = None
    recent: int = 32
    group: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("InfiniPot", "compressed", self.compressed, least=1, optional=True)
        require_count("InfiniPot", "recent", self.recent, least=1)

    def resolve(self, training_length: int | None) -> Self:
        """Fill in the window, and from it what a compression leaves."""
        resolved = self._with_window(training_length)
        window = resolved._field("window")
        compressed = window // 2 if self.compressed is None else self.compressed
        group = max(1, min(_GROUP, window - compressed)) if self.group is None else self.group
        if not self.sinks + self.recent < compressed <= window - group:
            raise ConfigurationError(
                f"InfiniPot: a pot of {window} that is compressed to {compressed} cannot hold {self.sinks} "
                f"sinks, the latest {self.recent} and one to choose, and then a group of {group}; use a "
                "larger window, fewer sinks, or another compressed, recent or group"
            )
        return replace(resolved, compressed=compressed, group=group)

    def left(self, n: int) -> int:
        """Return what a compression leaves."""
        return self._field("compressed")

    def latest_from(self, queries: Queries) -> int:
        """Return where the latest tokens before the group begin."""
        return queries.first - self.recent

    def observe(self, queries: Queries, view: LayerView) -> None:
        """Note the latest queries."""
        assert isinstance(view, KeptView)
        if view.is_own:
            note_queries(queries, view, self.recent)

    def worth(self, slots: Tensor, can_go: Tensor, view: KeptView) -> Tensor:
        """Return tokens' surprisal; the half that received most attention is worth more than any."""
        surprisal = super().worth(slots, can_go, view)
        received = self._received(slots, view).masked_fill(~can_go, -1)
        share = (self._field("compressed") - self.sinks - self.recent + 1) // 2
        order = received.sort(dim=-1, descending=True, stable=True).indices[..., :share]
        return surprisal.scatter(-1, order, torch.inf)

    def _received(self, slots: Tensor, view: KeptView) -> Tensor:
        """Return the attention of the noted queries, those of the latest tokens in the slots."""
        index, call, m = view.memory.index, view.call, slots.shape[-1]
        queries, rotation = index[QUERIES], call.rotation
        n = queries.shape[2]
        own = torch.arange(m - n, m, device=slots.device)[:, None]
        slot = torch.arange(m, device=slots.device)
        real = view.at.gather(2, slots)[:, :1, None] >= view.pad_column(slots.device)
        visible = real & (slot <= own) & real[..., m - n :].transpose(2, 3)
        how = Weighing(call.scaling, call.softcap, index.get(SINK_LOGITS))
        placed, keys = rotation(queries, range(m - n, m)), rotation(view.keys_in(slots), range(m))
        return weigh(placed, keys, None, visible, how)[1].float()
