"""ReAttention: spans around the keys that most queries ask for, as if nothing stood between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from everlong.attention.policy import POLICIES, require_count
from everlong.attention.positions import working_dtype
from everlong.attention.ready import Choice, Span
from everlong.attention.recalled import Asking, RecallPolicy
from everlong.attention.view import LayerView, Queries

_BLOCK = 4096  # keys scored at a time


@POLICIES.register("re-attention")
@dataclass(frozen=True)
class ReAttention(RecallPolicy):
    """ReAttention: Training-Free Infinite Context (Liu et al., ICLR 2025, arXiv 2407.15176).

    What is kept: all tokens, what left the window in a tier below. What a query sees: `sinks` tokens, the
    spans that its group recalled, and the latest tokens. At which positions: one behind the other, as if
    these were all there is. What is forgotten: nothing.

    Every query and query head of a group votes for the `votes` keys with the largest product, neither
    rotated. Those with most votes are recalled, as many as fit, each with `radius` tokens on both sides.

    Parameters
    ----------
    sinks : int
        G, first tokens kept; 32 in the paper.
    window : int, optional
        W, all keys a query sees: sinks, recalled and latest ones; the model's training length by default. In
        the paper 32 + 127 spans of 33 + 4,096.
    recalled : int, optional
        Tokens recalled, a multiple of ``2 * radius + 1``; by default about half of ``window - sinks``, as in
        the paper. Where spans overlap it is less.
    votes : int
        Of each query and head.
    radius : int
        Tokens recalled on either side of a key.
    group : int
        Queries that vote together in prefill; each alone while writing.
    """

    are_in_cache: ClassVar[bool] = True

    sinks: int = 32
    window: int | None = None
    recalled: int | None = None
    votes: int = 4
    radius: int = 16
    group: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("ReAttention", "votes", self.votes, least=1)
        require_count("ReAttention", "radius", self.radius, least=0)

    def unit(self) -> int:
        """Return the tokens of a span."""
        return 2 * self.radius + 1

    def choose(self, asking: Asking, queries: Queries, view: LayerView) -> Choice:
        """Return the spans around the keys with most votes."""
        voted = self._voted(asking, queries, view)
        votes = torch.bincount(voted.flatten() - asking.begin)
        order = votes.sort(descending=True, stable=True).indices
        most = self.shape()[1] // self.unit()
        chosen = order[: min(most, int(votes.count_nonzero()))].sort().values + asking.begin
        spans: list[Span] = []
        for at in chosen.tolist():
            begin, stop = max(at - self.radius, asking.begin), min(at + self.radius + 1, asking.stop)
            if spans and begin <= spans[-1][1]:
                spans[-1] = spans[-1][0], stop
            else:
                spans.append((begin, stop))
        return [spans]

    def _voted(self, asking: Asking, queries: Queries, view: LayerView) -> Tensor:
        """Return the tokens each query and head votes for, on the CPU."""
        asked = queries.raw[asking.number, :, asking.queries].detach()
        asked = asked.to(working_dtype(asked))
        pad = view.pads[asking.number] if view.pads else 0
        best: tuple[Tensor, Tensor] | None = None
        for begin in range(asking.begin, asking.stop, _BLOCK):
            stop = min(begin + _BLOCK, asking.stop)
            keys = view.middle(begin + pad, stop + pad)[0][asking.number].detach()
            folded = asked.reshape(len(keys), -1, asked.shape[-1])
            products = folded @ keys.to(asked.dtype).transpose(-1, -2)
            top, at = products.topk(min(self.votes, stop - begin), dim=-1)
            at = at + begin
            if best is not None:
                top, at = torch.cat((best[0], top), -1), torch.cat((best[1], at), -1)
                top, order = top.topk(min(self.votes, top.shape[-1]), dim=-1)
                at = at.gather(-1, order)
            best = top, at
        assert best is not None
        return best[1].cpu()
