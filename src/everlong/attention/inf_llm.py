"""InfLLM: blocks of what left the window, found again by a few of their own keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from everlong.attention.policy import POLICIES, require_count
from everlong.attention.positions import Rotation, working_dtype
from everlong.attention.recalled import Asking, BlockRecallPolicy, by_key_head, held_keys, reserve_notes
from everlong.attention.view import LayerView, Queries


@POLICIES.register("inf-llm")
@dataclass(frozen=True)
class InfLLM(BlockRecallPolicy):
    """InfLLM: Training-Free Long-Context Extrapolation (Xiao et al., 2024, arXiv 2402.04617).

    What is kept: all tokens, what left the window in a tier below, in blocks. What a query sees: `sinks`
    tokens, the blocks that its group recalled, and the latest ones. At which positions: the latest at their
    true distance L - 1 at most; sinks and blocks all at L - 1. What is forgotten: nothing.

    A block is known by its representatives: of its keys those which the queries after it attended to most,
    before the softmax. As a sum over queries of a product is the product of their sum, only sums of queries
    are kept, one for each block: those count which follow the block, and are less than L tokens away from
    all of its keys. What a block is worth to a group is the product of the mean query, at L - 1, and the mean
    representative, summed over heads.

    Parameters
    ----------
    sinks : int
        G, first tokens kept; 128 in the paper.
    window : int, optional
        W, all keys a query sees: sinks, recalled and latest ones; the model's training length by default. In
        the paper 128 + 2,048 + 4,096.
    recalled : int, optional
        Tokens recalled, a multiple of `block`; by default about a third of ``window - sinks``, as in the
        paper.
    block : int
        Tokens of a block.
    representatives : int
        Keys by which a block is known.
    group : int
        Queries that ask together in prefill, with what they have in common; each alone while writing.
    """

    sinks: int = 128
    window: int | None = None
    recalled: int | None = None
    block: int = 128
    representatives: int = 4
    group: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("InfLLM", "representatives", self.representatives, least=1)

    def least_local(self) -> int:
        """Return a block: of one that leaves, others must tell what represents it."""
        return self.block

    def worth(self, blocks: range, asking: Asking, queries: Queries, view: LayerView) -> Tensor:
        """Return the products of the mean query with the representatives, summed over heads."""
        _, representatives = _names(view)
        keys = view.memory.index[representatives][asking.number, blocks.start : blocks.stop]
        asked = self.far_queries(queries)[asking.number, :, asking.queries].detach().to(keys.dtype)
        return (keys * by_key_head(asked.mean(1), keys.shape[1])).sum((1, 2))

    # --- representatives ---------------------------------------------------------------------------------

    def observe(self, queries: Queries, view: LayerView) -> None:
        """Add the queries to the sums of their blocks, and find what represents blocks that are left."""
        sinks, _, local = self.shape()
        index, (sums, representatives) = view.memory.index, _names(view)
        if sums not in index:
            index |= self._blank(queries, view)
        for row, pad in enumerate(view.pads or (0,) * len(queries.raw)):
            first, stop = queries.first - pad - sinks, queries.stop - pad - sinks
            start = view.memory.frame(pad + sinks)
            self._add(index[sums][row], queries.placed[row], first, start, view.rotation)
            before, now = (max(0, (at - local + 1) // self.block) for at in (first, stop))
            reserve_notes(index, representatives, now)
            for number in range(before, now):
                begin = pad + sinks + number * self.block
                keys = view.middle(begin, begin + self.block)[0][row]
                following = self._following(index[sums][row], number)
                index[representatives][row, number] = self._representative(keys, following, view.rotation)

    def _blank(self, queries: Queries, view: LayerView) -> dict[str, Tensor]:
        keys = held_keys(view)
        counts = (self._window + self.group) // self.block + 2, 0
        with torch.inference_mode(False):  # later forwards, in whatever mode, write into it
            return {
                name: torch.zeros(
                    (len(keys), count, keys.shape[1], keys.shape[3]),
                    dtype=working_dtype(keys),
                    device=queries.raw.device,
                )
                for name, count in zip(_names(view), counts, strict=True)
            }

    def _add(self, sums: Tensor, placed: Tensor, first: int, start: int, rotation: Rotation) -> None:
        """Add queries (heads, n, d), the first of them token `first` after the sinks, to their blocks' sums.

        Each sum is of queries as if its block began at 0. `start` is where the sinks end in the frame.
        """
        heads, at = sums.shape[1], max(first, 0)
        stop = first + placed.shape[1]
        while at < stop:
            number = at // self.block
            end = min(stop, (number + 1) * self.block)
            total = placed[:, at - first : end - first].detach().to(sums.dtype).sum(1)
            total = by_key_head(total, heads)
            total = rotation.move(total[None, :, None], -(start + number * self.block))[0, :, 0]
            slot = number % len(sums)
            sums[slot] = total if at == number * self.block else sums[slot] + total
            at = end

    def _following(self, sums: Tensor, number: int) -> Tensor:
        """Return the sums of the blocks that follow one less than L tokens away, shape (n, heads, d)."""
        count = (self.shape()[2] - 1) // self.block
        return sums[torch.arange(number + 1, number + 1 + count, device=sums.device) % len(sums)]

    def _representative(self, keys: Tensor, following: Tensor, rotation: Rotation) -> Tensor:
        """Return the mean of the keys, of a block's (heads, n, d), that draw the queries after it most."""
        keys = keys.detach().to(following.dtype)
        away = torch.arange(1, len(following) + 1)[:, None] * self.block
        asked = rotation(following[:, :, None], away)[:, :, 0].sum(0)  # as the block's first token sees them
        drawn = (rotation(keys[None], range(keys.shape[1]))[0] * asked[:, None]).sum(-1)
        best = drawn.sort(dim=-1, descending=True, stable=True).indices[:, : self.representatives]
        return keys.gather(1, best[..., None].expand(-1, -1, keys.shape[2])).mean(1)


def _names(view: LayerView) -> tuple[str, str]:
    """Return what a layer calls sums of queries and representatives: some layers share a memory."""
    return f"{view.call.layer}.queries", f"{view.call.layer}.representatives"
