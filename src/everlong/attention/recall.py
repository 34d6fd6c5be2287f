"""Recall: blocks of what left the window, found again by the best of their keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from everlong.attention.layer_memory import LayerMemory
from everlong.attention.policy import POLICIES, require_count
from everlong.attention.positions import working_dtype
from everlong.attention.ready import Choice
from everlong.attention.recalled import Asking, BlockRecallPolicy, by_key_head, held_keys, products_with
from everlong.attention.view import LayerView, Queries

_NEVER = -1


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
    steps : int
        Queries, one after another, that recall the same where each comes alone, as in writing: the first of
        them asks.
    """

    sinks: int = 16
    window: int | None = None
    recalled: int | None = None
    block: int = 32
    group: int = 512
    layers: int = 1
    steps: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("Recall", "layers", self.layers, least=1)
        require_count("Recall", "steps", self.steps, least=1)

    def choose(self, asking: Asking, queries: Queries, view: LayerView) -> Choice:
        """Return what still stands, what a layer shortly before chose, or the blocks that are worth most."""
        is_alone = queries.stop - queries.first == 1
        if is_alone:
            standing = self._standing(asking, queries.first, view)
            if standing is not None:
                return standing
        call, key = view.call, ("recalled", asking.number, queries.first)
        asked: tuple[int, Choice] = call.memo.get(key, (call.layer - self.layers, [[]]))
        layer, chosen = asked
        is_here = not chosen[0] or chosen[0][0][0] >= asking.begin  # unless its tier lost what others have
        if call.layer - layer >= self.layers or not is_here:
            chosen = super().choose(asking, queries, view)
            call.memo[key] = call.layer, chosen
        if self.steps > 1 and view.memory.pending is None:
            self._note(asking.number, queries.first if is_alone else _NEVER, chosen, view)
        return chosen

    def standing(self, memory: LayerMemory, layer: int, pads: tuple[int, ...] | None) -> int | None:
        """Return L where each row, its window full, sees what a token shortly before it chose."""
        notes = memory.index.get(_name(layer))
        if notes is None or memory.tier is None or memory.seen - max(pads or (0,)) < self._window:
            return None
        rows = notes.tolist()
        least = self.sinks + memory.tier.first - min(pads or (0,))
        stands = all(
            0 <= asked < memory.seen < asked + self.steps
            and blocks.count(_NEVER) == rows[0].count(_NEVER)
            and self.block_span(blocks[0])[0] >= least
            for asked, *blocks in rows
        )
        return self.shape()[2] if stands else None

    def _standing(self, asking: Asking, first: int, view: LayerView) -> Choice | None:
        """Return what a query shortly before chose, if it came alone and all of it is still here."""
        notes = view.memory.index.get(_name(view.call.layer))
        asked, *blocks = [_NEVER] if notes is None else notes[asking.number].tolist()
        if not 0 <= asked < first < asked + self.steps:
            return None
        spans = [self.block_span(number) for number in blocks if number >= 0]
        return None if spans and spans[0][0] < asking.begin else [spans]

    def _note(self, row: int, asked: int, chosen: Choice, view: LayerView) -> None:
        """Note which query of a row asked, and which blocks it chose; these in order, behind them -1."""
        index, name = view.memory.index, _name(view.call.layer)
        if name not in index:
            with torch.inference_mode(False):  # later forwards, in whatever mode, write into it
                room = 1 + self.shape()[1] // self.block
                index[name] = torch.full((len(held_keys(view)), room), _NEVER)
        blocks = [(begin - self.sinks) // self.block for begin, _ in chosen[0]]
        notes = [asked, *blocks]
        index[name][row] = torch.tensor(notes + [_NEVER] * (index[name].shape[1] - len(notes)))

    def worth(self, blocks: range, asking: Asking, queries: Queries, view: LayerView) -> Tensor:
        """Return the products of the mean query with the best key of each block, summed over heads."""
        asked = queries.raw[asking.number, :, asking.queries].detach()
        mean = by_key_head(asked.to(working_dtype(asked)).mean(1), held_keys(view).shape[1])
        begin, stop = self.block_span(blocks.start)[0], self.block_span(blocks.stop - 1)[1]
        products = products_with(mean, asking.number, begin, stop, view)
        return products.reshape(-1, self.block).amax(1)


def _name(layer: int) -> str:
    """Return what a layer calls its notes: some layers share a memory."""
    return f"{layer}.recalled"
