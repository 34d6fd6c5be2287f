"""Recall: blocks of what left the window, found again by the best of their keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from everlong.attention.policy import POLICIES
from everlong.attention.positions import working_dtype
from everlong.attention.recalled import Asking, BlockRecallPolicy, by_key_head
from everlong.attention.view import LayerView, Queries

_KEYS = 4096  # looked at at a time


@POLICIES.register("recall")
@dataclass(frozen=True)
class Recall(BlockRecallPolicy):
    """Everlong's own: the blocks of InfLLM, smaller, found by looking at every key as ReAttention does.

    What is kept: all tokens, what left the window in a tier below, in blocks. What a query sees: `sinks`
    tokens, the blocks that its group recalled, and the latest ones. At which positions: the latest at their
    true distance, L - 1 at most; sinks and blocks all at L - 1. What is forgotten: nothing.

    A block is worth as much as its best key: the product with the mean query of the group, neither rotated,
    summed over heads. So every key is looked at once a group, not once a query and head. What each choice is
    worth: benchmarks/results/passkey_library.md; the size of blocks, most.

    Parameters
    ----------
    sinks : int
        G, first tokens kept.
    window : int, optional
        W, all keys a query sees: sinks, recalled and latest ones; the model's training length by default.
    recalled : int, optional
        Tokens recalled, a multiple of `block`; by default about a third of ``window - sinks``.
    block : int
        Tokens of a block.
    group : int
        Queries that ask together in prefill, with what they have in common; each alone while writing.
    """

    sinks: int = 16
    window: int | None = None
    recalled: int | None = None
    block: int = 32
    group: int = 512

    def worth(self, blocks: range, asking: Asking, queries: Queries, view: LayerView) -> Tensor:
        """Return the products of the mean query with the best key of each block, summed over heads."""
        asked = queries.raw[asking.number, :, asking.queries].detach()
        mean = asked.to(working_dtype(asked)).mean(1)
        pad = view.pads[asking.number] if view.pads else 0
        step, worth = max(1, _KEYS // self.block), []
        for number in range(blocks.start, blocks.stop, step):
            begin, stop = self.block_span(number)[0], self.block_span(min(number + step, blocks.stop) - 1)[1]
            keys = view.middle(begin + pad, stop + pad)[0][asking.number].detach().to(mean.dtype)
            products = (keys @ by_key_head(mean, len(keys))[..., None]).sum((0, 2))
            worth.append(products.reshape(-1, self.block).amax(1))
        return torch.cat(worth)
