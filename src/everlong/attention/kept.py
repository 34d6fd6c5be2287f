"""The memory of policies that choose what to keep: for each row and key-value head a set, not a run.

Tokens lie in slots, in the order of the stream; each knows its index. Where room is needed some slots are
dropped, in each row and key-value head others: never by query head, which would save nothing where several of
them share keys. So all rows and heads hold the same number of slots. Padding lies in slots of its own, is
never seen, and is dropped first. What is chosen during a forward is a selection of what was held and what is
new; the memory takes it over when the forward settles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from everlong.attention.kept_view import AT, SCORE, KeptView, best, picked
from everlong.attention.layer_memory import LayerMemory
from everlong.attention.positions import Rotation
from everlong.attention.view import LayerCall, LayerView
from everlong.errors import UnsupportedUseError

_NUMBERS = ("gone", "has_dead", "scaling", "softcap")


class KeptMemory(LayerMemory):
    """What one layer keeps of a stream, each row and key-value head its own choice.

    Parameters
    ----------
    room : int or None
        Slots of each row and head, at most; None: as many as there are tokens, until some are dropped.
    in_cache : bool
        Whether tokens stand at their place among those kept, and keys are therefore stored unrotated;
        otherwise they stand where they stood in the stream, and are stored rotated.
    start : int
        Stream position of the first token.
    """

    def __init__(self, room: int | None, *, in_cache: bool, start: int = 0) -> None:
        super().__init__(0, None, start=start)
        self.window = room
        self.in_cache = in_cache
        self.gone = 0
        """Slots dropped so far, in each row and head."""
        self.has_dead = False
        """Whether some rows have slots that count for nothing: their index is -1."""
        self.scaling = 1.0
        self.softcap: float | None = None

    # --- accounts ----------------------------------------------------------------------------------

    @property
    def held(self) -> int:
        """Tokens per row and head. Heads choose differently: more tokens than these are held by some head."""
        return self.seen - self.gone

    @property
    def first(self) -> int:
        """Index from which on every token is held by every head of every row."""
        if not self.gone:
            return 0
        there = self.index[AT].sort(dim=-1).values == torch.arange(self.gone, self.seen, device=self.device)
        missing = (~there.all(0).all(0)).nonzero()
        return self.gone if not len(missing) else self.gone + int(missing[-1]) + 1

    @property
    def device(self) -> torch.device:
        """Where the notes are."""
        return self.index[AT].device

    def nbytes_at(self, tokens: int) -> dict[str, int]:
        """Bytes it will hold when `tokens` were seen, notes of the tokens included."""
        found = super().nbytes_at(tokens)
        held = tokens if self.window is None else min(tokens, self.window)
        notes = sum(self.index[name][..., :1].nbytes for name in (AT, SCORE))
        rest = sum(note.nbytes for name, note in self.index.items() if name not in (AT, SCORE))
        return {**found, "window": found["window"] + held * notes + rest}

    # --- one forward -------------------------------------------------------------------------------

    def append(
        self, raw_keys: Tensor, values: Tensor, call: LayerCall, *, provisional: bool = False
    ) -> KeptView:
        """Take in the n tokens of one forward; parameters as of :meth:`LayerMemory.append`."""
        assert not provisional and call.branches is None, "the cache refuses to take tokens back"
        batch, heads, n, _ = raw_keys.shape
        self.follow(call.rotation, n)
        self.scaling, self.softcap = call.scaling, call.softcap
        if AT not in self.index:
            with torch.inference_mode(False):  # later forwards, in whatever mode, use them
                self.index[AT] = torch.zeros(batch, heads, 0, dtype=torch.long, device=raw_keys.device)
                self.index[SCORE] = torch.zeros(batch, heads, 0, device=raw_keys.device)
        keys = raw_keys
        if not self.in_cache:
            keys = call.rotation(raw_keys, range(self.frame(self.seen), self.frame(self.seen + n)))
        return KeptView(self, call, self.seen + n, (keys, values, raw_keys))

    def begin_with(self, keys: Tensor, values: Tensor, rotation: Rotation) -> None:
        """Hold the keys and values of a prefix; parameters as of :meth:`LayerMemory.begin_with`."""
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            raise UnsupportedUseError(
                "a prefix cannot be trained under a policy that chooses what to keep: train it under "
                "FullAttention or LMInfinite"
            )
        super().begin_with(keys, values, rotation)

    def follow(self, rotation: Rotation, n: int) -> None:
        """Bring keys that are stored rotated to this forward's table."""
        old, new = self.frequencies, rotation.frequencies
        changes = old is not None and new is not None and not new.same_as(old)
        if changes and self.held and not self.in_cache:
            assert self.keys is not None
            held = self.keys[:, :, : self.held]
            at = self.index[AT].clamp(min=0).flatten(0, 1) + self.frame(0)
            flat = held.flatten(0, 1)[:, None]
            raw = Rotation(old, self.layout).undo(flat, at)
            held.copy_(rotation(raw, at)[:, 0].view_as(held))
        self.frequencies, self.layout = new, rotation.layout

    def take_one(self, keys: Tensor, values: Tensor, slots: Tensor | None) -> None:
        """Put one token a row into a free slot, or into one of each head, (batch, heads, 1); not counted."""
        at = self.index[AT].new_full((*keys.shape[:2], 1), self.seen)
        if slots is None:
            self._reserve(self.held + 1, keys, values)
            assert self.keys is not None and self.values is not None
            self.keys.narrow(2, self.held, 1).copy_(keys)
            self.values.narrow(2, self.held, 1).copy_(values)
            with torch.inference_mode(False), torch.no_grad():
                self.index[AT] = torch.cat((self.index[AT], at), 2)
                self.index[SCORE] = torch.cat((self.index[SCORE], torch.zeros_like(at, dtype=torch.float)), 2)
            return
        assert self.keys is not None and self.values is not None
        rows, heads = (torch.arange(size, device=at.device) for size in keys.shape[:2])
        for buffer, new in ((self.keys, keys), (self.values, values)):
            buffer[rows[:, None], heads, slots[..., 0]] = new[:, :, 0].to(buffer.dtype)
        self.index[AT].scatter_(2, slots, at)
        self.index[SCORE].scatter_(2, slots, 0.0)

    def settle(self, view: LayerView) -> None:
        """Take over what was chosen, and count the tokens."""
        assert isinstance(view, KeptView)
        n, stage = view.stop - self.seen, view.latest
        if stage is not None and stage.is_put:
            self.gone += stage.replaced
        elif stage is None or stage.slots is None:  # nothing was dropped
            keys, values = (x.detach() for x in view.fresh[:2])
            held = self.held
            self._reserve(held + n, keys, values)
            assert self.keys is not None and self.values is not None
            self.keys[:, :, held : held + n] = keys
            self.values[:, :, held : held + n] = values
            self.note(view.at, view.score)
        else:
            self.gone += self.held + n - stage.count
            self.keys, self.values = stage.keys.detach(), stage.values.detach()
            if torch.is_grad_enabled():  # the graph holds them as they are
                self.keys, self.values = self.keys.clone(), self.values.clone()
            self.note(view.at.gather(2, stage.slots), view.score.gather(2, stage.slots))
            self.has_dead = view.has_dead and bool((self.index[AT] < 0).any())
        self.seen += n

    def keep(self, worth: Tensor, keeps: Sequence[int]) -> None:
        """Drop, of each row, all but so many tokens that are worth most, (batch, key-value heads, held)."""
        slots, is_dead = best(worth, self.index[AT], keeps)
        assert self.keys is not None and self.values is not None
        with torch.inference_mode(False), torch.no_grad():
            self.keys, self.values = picked(self.keys, slots), picked(self.values, slots)
            at, score = (self.index[name].gather(2, slots) for name in (AT, SCORE))
            self.note(at if is_dead is None else at.masked_fill(is_dead, -1), score)
        self.has_dead = is_dead is not None
        self.gone = self.seen - slots.shape[2]

    def note(self, at: Tensor, score: Tensor) -> None:
        """Take over indices and scores of what is held, (batch, key-value heads, held) each."""
        with torch.inference_mode(False), torch.no_grad():
            for name, notes in ((AT, at), (SCORE, score.detach())):  # later forwards use them in any mode
                self.index[name] = notes.clone() if notes.is_inference() else notes

    def grown(self, slots: int) -> int:
        """Return a quarter more, but fewer once some were dropped: it was to be small."""
        return slots + max(slots // 8, 8) if self.gone else super().grown(slots)

    # --- state -------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and numbers from which :meth:`load` continues bit by bit."""
        tensors, numbers = super().state()
        own = {name: getattr(self, name) for name in _NUMBERS}
        return tensors, numbers | own

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any], rotation: Rotation) -> None:
        """Take over what :meth:`state` returned."""
        for name in _NUMBERS:
            setattr(self, name, numbers[name])
        super().load(tensors, numbers, rotation)
