"""Recall: blocks of what left the window, found again by the best of their keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from everlong.attention.policy import POLICIES, require_count
from everlong.attention.positions import working_dtype
from everlong.attention.ready import Choice
from everlong.attention.recalled import Asking, BlockRecallPolicy, by_key_head, held_keys, products_with
from everlong.attention.view import LayerView, Queries


@POLICIES.register("recall")
@dataclass(frozen=True)
class Recall(BlockRecallPolicy):
    """Everlong's own: the blocks of InfLLM, smaller, found by looking at every key as ReAttention does.

    What is kept: all tokens, what left the window in a tier below, in blocks. What a query sees: `sinks`
    tokens, the blocks that its group recalled, and the latest ones. At which positions: the latest at their
    true distance, L - 1 at most; sinks and blocks all at L - 1. What is forgotten: nothing.

    A block is worth as much as its best key: the product with the mean query of the group, neither rotated,
    summed over heads. So every key is looked at once a group, not once a query and head; keys that are in a
    tier in bytes (:class:`~everlong.attention.key_index.KeyIndex`). What each choice is worth:
    benchmarks/results/passkey_library.md; the size of blocks, most.

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
    layers : int
        Layers, one after another, that recall the same: the first of them asks. Those with windows of their
        own count, too.
    """

    sinks: int = 16
    window: int | None = None
    recalled: int | None = None
    block: int = 32
    group: int = 512
    layers: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("Recall", "layers", self.layers, least=1)

    def choose(self, asking: Asking, queries: Queries, view: LayerView) -> Choice:
        """Return what a layer shortly before chose, or the blocks that are worth most."""
        call, key = view.call, ("recalled", asking.number, queries.first)
        asked: tuple[int, Choice] = call.memo.get(key, (call.layer - self.layers, [[]]))
        layer, chosen = asked
        is_here = not chosen[0] or chosen[0][0][0] >= asking.begin  # unless its tier lost what others have
        if call.layer - layer >= self.layers or not is_here:
            chosen = super().choose(asking, queries, view)
            call.memo[key] = call.layer, chosen
        return chosen

    def worth(self, blocks: range, asking: Asking, queries: Queries, view: LayerView) -> Tensor:
        """Return the products of the mean query with the best key of each block, summed over heads."""
        asked = queries.raw[asking.number, :, asking.queries].detach()
        mean = by_key_head(asked.to(working_dtype(asked)).mean(1), held_keys(view).shape[1])
        begin, stop = self.block_span(blocks.start)[0], self.block_span(blocks.stop - 1)[1]
        products = products_with(mean, asking.number, begin, stop, view)
        return products.reshape(-1, self.block).amax(1)
