"""Recall: blocks of what left the window, found again by the best of their keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from everlong.attention.layer_memory import LayerMemory
from everlong.attention.policy import POLICIES, require_count
from everlong.attention.positions import working_dtype
from everlong.attention.ready import Choice
from everlong.attention.recalled import Asking, BlockRecallPolicy, held_keys, products_with
from everlong.attention.view import LayerView, Queries

_NEVER = -1


@POLICIES.register("recall")
@dataclass(frozen=True)
class Recall(BlockRecallPolicy):
    """Everlong's own: the blocks of InfLLM, smaller, found by looking at every key as ReAttention does.

    What is kept: all tokens, what left the window in a tier below, in blocks. What a query sees: `sinks`
    tokens, the blocks that its group recalled, and the latest ones. At which positions: the latest at their
    true distance, L - 1 at most; sinks and blocks all at L - 1. What is forgotten: nothing.

    Of a group, the last queries ask each by itself, and those before them with their mean; neither they nor
    keys are rotated. Each head of each gives a block the softmax, over all blocks, of the logit of its best
    key, and a block is worth the sum of these: so a head that knows what it looks for has as much to say as
    many that do not. Every key is looked at, but not by each query; keys that are in a tier in bytes
    (:class:`~everlong.attention.key_index.KeyIndex`). What each choice is worth:
    benchmarks/results/passkey_library.md.

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
        Queries that ask together in prefill.
    probes : int
        That many of a group ask: the last ones and, as one, those before.
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
    probes: int = 4
    layers: int = 1
    steps: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("probes", "layers", "steps"):
            require_count("Recall", field, self._field(field), least=1)

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
        """Return L where each row, its window full, sees what a token shortly before it chose.

        Not for subclasses that take notes of their own: they are to see every token.
        """
        if type(self).observe is not BlockRecallPolicy.observe:
            return None
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
        if len(chosen) > 1:  # a subclass whose heads choose for themselves
            asked = _NEVER
        if name not in index:
            if asked == _NEVER:
                return
            with torch.inference_mode(False):  # later forwards, in whatever mode, write into it
                room = 1 + self.shape()[1] // self.block
                index[name] = torch.full((len(held_keys(view)), room), _NEVER)
        blocks = [(begin - self.sinks) // self.block for begin, _ in chosen[0]]
        notes = [asked, *blocks]
        index[name][row] = torch.tensor(notes + [_NEVER] * (index[name].shape[1] - len(notes)))

    def worth(self, blocks: range, asking: Asking, queries: Queries, view: LayerView) -> Tensor:
        """Return the logarithm of what all heads of all that ask give each block."""
        asked = self._asked(queries.raw[asking.number, :, asking.queries].detach())
        columns = _by_key_head(asked * view.call.scaling, held_keys(view).shape[1])
        begin, stop = self.block_span(blocks.start)[0], self.block_span(blocks.stop - 1)[1]
        logits = products_with(columns, asking.number, begin, stop, view)
        best = logits.reshape(len(blocks), self.block, -1).amax(1)
        return best.log_softmax(0).logsumexp(1)

    def _asked(self, queries: Tensor) -> Tensor:
        """Return those of a group's queries, (heads, n, d), that ask: the last, before them a mean."""
        queries = queries.to(working_dtype(queries))
        before = queries.shape[1] - self.probes + 1
        if before <= 1:
            return queries
        return torch.cat((queries[:, :before].mean(1, keepdim=True), queries[:, before:]), 1)


def _name(layer: int) -> str:
    """Return what a layer calls its notes: some layers share a memory."""
    return f"{layer}.recalled"


def _by_key_head(asked: Tensor, heads: int) -> Tensor:
    """Return each query of (query heads, n, d) beside zeros for the other key-value heads: (c, heads, d)."""
    each = asked.reshape(heads, -1, asked.shape[-1])
    columns = each.new_zeros(heads, each.shape[1], heads, each.shape[2])
    for head in range(heads):
        columns[head, :, head] = each[head]
    return columns.flatten(0, 1)
