"""Quest: pages of what left the window, found by the least and the largest their keys are in each channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from everlong.attention.policy import POLICIES, require_count
from everlong.attention.positions import working_dtype
from everlong.attention.recalled import Asking, BlockRecallPolicy, by_key_head, held_keys, reserve_notes
from everlong.attention.view import LayerView, Queries

_BOUNDS = "bounds"  # of keys alone: layers that share a memory note the same


@POLICIES.register("quest")
@dataclass(frozen=True)
class Quest(BlockRecallPolicy):
    """Quest: Query-Aware Sparsity for Long-Context Inference (Tang et al., ICML 2024, arXiv 2406.10774).

    What is kept: all tokens, what left the window in a tier below. What a query sees: `sinks` tokens, the
    pages that its group recalled, each key-value head its own, and the latest tokens. At which positions: the
    latest at their true distance, L - 1 at most; sinks and pages all at L - 1. What is forgotten: nothing.

    A page is known by its bounds: the smallest and the largest number in each channel of its keys. What it is
    worth to a query is the sum over channels of max(q * smallest, q * largest), which no product with a key
    of the page exceeds. The paper's keys and queries are rotated to their positions. Here recalled keys stand
    at 0 and their queries at L - 1, so bounds are of keys that are not rotated and q is at L - 1: they bound
    the very logits that the page gets.

    What differs from the paper, which decodes with a budget after a prefill with full attention: all reading
    is within the budget, and a group of queries in prefill asks by its mean. Query heads that share keys ask
    together, by the sum of what pages are worth to each. Sinks and the latest tokens are always seen. No
    layer is dense, as the paper's first two are: it would read its whole tier for every token.

    Parameters
    ----------
    sinks : int
        G, first tokens kept; none in the paper.
    window : int, optional
        W, all keys a query sees: sinks, recalled and latest ones; the model's training length by default.
    recalled : int, optional
        Tokens that each head recalls, a multiple of `block`; by default about a third of ``window - sinks``.
    block : int
        Tokens of a page, at least 2; 16 in the paper.
    group : int
        Queries that ask together in prefill, with what they have in common; each alone while writing.
    """

    heads_agree: ClassVar[bool] = False

    sinks: int = 16
    window: int | None = None
    recalled: int | None = None
    block: int = 16
    group: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("Quest", "block", self.block, least=2)

    def worth(self, blocks: range, asking: Asking, queries: Queries, view: LayerView) -> Tensor:
        """Return for each key-value head the bound of each page's products with the mean query."""
        bounds = view.memory.index[_BOUNDS][asking.number, blocks.start : blocks.stop]
        asked = queries.raw[asking.number, :, asking.queries].detach()
        mean = asked.to(working_dtype(asked)).mean(1)
        mean = view.rotation(mean[None, :, None], self.shape()[2] - 1)[0, :, 0]
        # A negative number is multiplied by the smallest, a positive one by the largest.
        sides = torch.cat((mean.clamp(max=0), mean.clamp(min=0)), -1)
        sides = by_key_head(sides, bounds.shape[1])
        return torch.einsum("phc,hc->hp", bounds.to(sides.dtype), sides)

    def observe(self, queries: Queries, view: LayerView) -> None:
        """Note the bounds of the pages that no later query sees among its latest tokens."""
        sinks, _, local = self.shape()
        index = view.memory.index
        if _BOUNDS not in index:
            index[_BOUNDS] = self._blank(queries, view)
        for row, pad in enumerate(view.pads or (0,) * len(queries.raw)):
            start = pad + sinks
            before, now = (
                max(0, (at - start - local + 1) // self.block) for at in (queries.first, queries.stop)
            )
            if before == now:
                continue
            reserve_notes(index, _BOUNDS, now)
            begin, stop = start + before * self.block, start + now * self.block
            keys = view.middle(begin, stop)[0][row].detach()
            keys = keys.reshape(len(keys), -1, self.block, keys.shape[-1])
            index[_BOUNDS][row, before:now] = torch.cat((keys.amin(2), keys.amax(2)), -1).transpose(0, 1)

    def _blank(self, queries: Queries, view: LayerView) -> Tensor:
        """Return no bounds yet: (batch, pages, key-value heads, 2 d), the smallest before the largest."""
        keys = held_keys(view)
        with torch.inference_mode(False):  # later forwards, in whatever mode, write into it
            return torch.zeros(
                (len(keys), 0, keys.shape[1], 2 * keys.shape[3]),
                dtype=keys.dtype,
                device=queries.raw.device,
            )
