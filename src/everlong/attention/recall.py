"""Recall: blocks of what left the window, found again by the best of their keys."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from everlong.attention.key_index import KeyIndex
from everlong.attention.layer_memory import LayerMemory
from everlong.attention.policy import POLICIES, Policy, require_count
from everlong.attention.positions import working_dtype
from everlong.attention.ready import Choice
from everlong.attention.recalled import Asking, BlockRecallPolicy, best_products, held_keys
from everlong.attention.view import LayerView, Queries
from everlong.errors import ConfigurationError

_NEVER = -1
_BLOCK = 32  # tokens, where the window has room for it
_DISTANCE = 512  # tokens, where the latest are more


@POLICIES.register("recall")
@dataclass(frozen=True)
class Recall(BlockRecallPolicy):
    """Everlong's own: the blocks of InfLLM, smaller, found by looking at every key as ReAttention does.

    What is kept: all tokens, what left the window in a tier below, in blocks. What a query sees: `sinks`
    tokens, the blocks that its group recalled, and the latest ones, L. At which positions: the latest at
    their true distance; sinks and blocks all at `distance`, among them: the farther away something is shown,
    the less it has to say beside the latest. What is forgotten: nothing.

    Of a group, the last queries ask each by itself, and those before them with their mean; neither they nor
    keys are rotated. Each head of each gives a block the softmax, over all blocks, of the logit of its best
    key, and a block is worth the sum of these: so a head that knows what it looks for has as much to say as
    many that do not. Every key is looked at, but not by each query; keys that are in a tier in bytes
    (:class:`~everlong.attention.key_index.KeyIndex`). Where a query asks alone, as in writing, what was given
    to those that asked before counts, too, the less the longer ago: a single query may miss what it needs.
    What each choice is worth: benchmarks/results/passkey_far.md, passkey_library.md and choices.md.

    Parameters
    ----------
    sinks : int
        G, first tokens kept.
    window : int, optional
        W, all keys a query sees: sinks, recalled and latest ones; the model's training length by default.
    recalled : int, optional
        Tokens recalled, a multiple of `block`; by default about a third of ``window - sinks``.
    block : int, optional
        Tokens of a block; 32 by default, less where a third of ``window - sinks`` is.
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
    distance : int, optional
        How far before a query sinks and blocks are shown; 512 by default, or L - 1 where that is less.
    lead : int, optional
        Tokens at the end of a block by whose keys the next block is judged, too: who looks there may soon
        want what follows. It divides a block, or is 0; by default a quarter of one, where that is whole.
    momentum : float
        What a block was given when it was asked for before counts so many times as much, for queries that
        come alone; that of the time before, so many times that; from 0 (only what is given now) to below 1.
    """

    may_leave_block: ClassVar[bool] = True

    sinks: int = 16
    window: int | None = None
    recalled: int | None = None
    block: int | None = None
    group: int = 512
    probes: int = 4
    layers: int = 1
    steps: int = 4
    distance: int | None = None
    lead: int | None = None
    momentum: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("probes", "layers", "steps"):
            require_count("Recall", field, self._field(field), least=1)
        for field in ("distance", "lead"):
            require_count("Recall", field, getattr(self, field), least=0, optional=True)
        if self.lead and self.block is not None and self.block % self.lead:
            raise ConfigurationError(
                f"Recall: lead={self.lead} must divide a block of {self.block} tokens, or be 0"
            )
        if not 0 <= self.momentum < 1:
            raise ConfigurationError(
                f"Recall: momentum must be from 0 to below 1, not {self.momentum}: what was given before "
                "fades, or there would be no end to it"
            )

    def resolve(self, training_length: int | None) -> Self:
        """Fill in the window, and with it a block, its lead, the recalled tokens and where they stand."""
        window = training_length if self.window is None else self.window
        if self.block is None and window is not None:
            room, block = self.recalled or self.default_recalled(window - self.sinks), _BLOCK
            while block > max(1, room):
                block //= 2
            return replace(self, block=block).resolve(training_length)
        resolved = super().resolve(training_length)
        if resolved.lead is None:
            lead, rest = divmod(resolved.unit(), 4)
            resolved = replace(resolved, lead=0 if rest else lead)
        if resolved.distance is not None:
            return resolved
        return replace(resolved, distance=min(_DISTANCE, resolved.shape()[2] - 1))

    def nbytes_beside(self, layer: int, tokens: int, memory: LayerMemory) -> dict[str, int]:
        """Return the bytes of what is ready to be shown, and of the keys that are looked at."""
        ready = super().nbytes_beside(layer, tokens, memory)
        if not ready or memory.keys is None or layer % self.layers:
            return ready
        return {**ready, "ram": KeyIndex.bytes_of(tokens - self._window, memory.keys)}

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

    def far_distance(self) -> int:
        """Return where sinks and recalled tokens stand."""
        return self._field("distance")

    def standing(
        self, memory: LayerMemory, layer: int, pads: tuple[int, ...] | None
    ) -> tuple[int, int] | None:
        """Return L and the distance where each row, its window full, sees what one shortly before it chose.

        Not for subclasses that take notes of their own: they are to see every token.
        """
        if type(self).observe is not Policy.observe:
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
        return (self.shape()[2], self.far_distance()) if stands else None

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
                room = 1 + self.shape()[1] // self.unit()
                index[name] = torch.full((len(held_keys(view)), room), _NEVER)
        blocks = [(begin - self.sinks) // self.unit() for begin, _ in chosen[0]]
        notes = [asked, *blocks]
        index[name][row] = torch.tensor(notes + [_NEVER] * (index[name].shape[1] - len(notes)))

    def worth(self, blocks: range, asking: Asking, queries: Queries, view: LayerView) -> Tensor:
        """Return the logarithm of what all heads of all that ask give each block."""
        asked = self._asked(queries.raw[asking.number, :, asking.queries].detach())
        asked = asked.reshape(held_keys(view).shape[1], -1, asked.shape[-1]) * view.call.scaling
        begin, stop = self.block_span(blocks.start)[0], self.block_span(blocks.stop - 1)[1]
        best = best_products(asked, asking.number, begin, stop, self.lead or self.unit(), view)
        if self.lead:
            pieces = best.view(*best.shape[:2], len(blocks), -1)
            best = pieces.amax(3)
            torch.maximum(best[..., 1:], pieces[..., :-1, -1], out=best[..., 1:])
        given = best.log_softmax(2).logsumexp((0, 1))
        if self.momentum:
            self._add_earlier(given, blocks, asking.number, queries, view)
        return given

    def _add_earlier(self, given: Tensor, blocks: range, row: int, queries: Queries, view: LayerView) -> None:
        """Add to what blocks are given what they were given before, if a query asks alone; and note it."""
        index, name = view.memory.index, f"{_name(view.call.layer)}.given"
        notes = index.get(name)
        if notes is not None and queries.stop - queries.first == 1:
            earlier = notes[row, blocks.start : blocks.stop].to(given)
            known = given[: len(earlier)]
            torch.logaddexp(known, earlier + math.log(self.momentum), out=known)
        if view.memory.pending is None:
            with torch.inference_mode(False):  # later forwards, in whatever mode, write into it
                if notes is None:
                    notes = given.new_empty(len(held_keys(view)), 0)
                if notes.shape[1] < blocks.stop:
                    notes = pad(notes, (0, blocks.stop - notes.shape[1]), value=-torch.inf)
            notes[row, blocks.start : blocks.stop] = given
            index[name] = notes

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
