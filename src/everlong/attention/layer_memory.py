"""What one attention layer holds between two forwards: sinks, a ring of local keys, and the tier below.

One buffer of W slots has a static shape once the window is full: the first G slots belong to the sinks,
the other L = W - G form the ring. Token t stands in slot t until the window is full, then in slot
G + (t - G) mod L. Local keys are stored once, rotated at their position in the frame; sinks are also
stored raw, since their distance does not follow the stream. Buffers grow by a quarter, up to the window.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from everlong.attention.positions import FRAME, Angles, Rotation
from everlong.attention.ready import ReadyTokens
from everlong.attention.tiers import BlockStore
from everlong.attention.view import LayerCall, LayerView
from everlong.errors import StateError
from everlong.models.rotary import Frequencies, Layout

_LEAST_GROWTH = 64  # slots
_NOTHING = {"ram": 0, "disk": 0}
_BUFFERS = ("keys", "values", "raw", "sink_keys", "sink_values")


class LayerMemory:
    """Sinks and ring of one layer, for a batch of rows that advance together.

    Parameters
    ----------
    sinks : int
        G, the first real tokens of each row, kept for good.
    local : int or None
        L, the latest tokens kept beside them; None: all.
    keep_raw : bool
        Whether the ring's keys are stored unrotated too (a ceiling inside the window, recall).
    keep_middle : bool
        Whether tokens that leave the window go to a tier below; otherwise they are forgotten.
    start : int
        Stream position of the first token.
    """

    def __init__(
        self,
        sinks: int,
        local: int | None,
        *,
        keep_raw: bool = False,
        keep_middle: bool = False,
        start: int = 0,
    ) -> None:
        self.sinks = sinks
        self.local = local
        self.window = None if local is None else sinks + local
        self.keep_raw = keep_raw or keep_middle
        self.tier = BlockStore() if keep_middle else None
        self.seen = 0
        self.start = start
        self.origin = start
        self.frequencies: Frequencies | None = None
        self.layout: Layout = "halves"
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.raw: Tensor | None = None
        self.sink_keys: Tensor | None = None
        self.sink_values: Tensor | None = None
        self.pending: tuple[Tensor, Tensor] | None = None
        self.index: dict[str, Tensor] = {}
        """What a policy notes of the tokens, to know later which to recall: by name, rows first."""
        self.ready = ReadyTokens()

    # --- reading ---------------------------------------------------------------------------------

    @property
    def held(self) -> int:
        """Tokens per row in sinks and ring."""
        return self.seen if self.window is None else min(self.seen, self.window)

    @property
    def kept(self) -> int:
        """Tokens per row that a query may see without their being recalled."""
        return self.held

    def takes_branches(self, height: int) -> bool:
        """Whether branches of `height` tokens may follow: no token of one has left another's window."""
        return self.tier is None or self.local is None or self.local > height

    def frame(self, index: int) -> int:
        """Return the frame position of token `index`."""
        return self.start + index - self.origin

    def outgrows_frame(self, n: int) -> bool:
        """Whether n tokens more need the stored keys to be brought to a new origin first."""
        return self.frame(self.seen + n) > FRAME

    def slot(self, index: int) -> int:
        """Return the slot of token `index`."""
        if self.local is None or index < self.sinks + self.local:
            return index
        return self.sinks + (index - self.sinks) % self.local

    def runs(self, begin: int, stop: int) -> list[slice]:
        """Return in which slots tokens [begin, stop), all in the ring, lie: one run of them, or two."""
        if begin >= stop:
            return []
        at = self.slot(begin)
        before = (stop - begin) if self.window is None else min(stop - begin, self.window - at)
        return [slice(at, at + before), *self.runs(begin + before, stop)]

    def ordered(self, buffer: Tensor) -> Tensor:
        """Return a buffer's local tokens in stream order: all from 0, or the last L once the ring turned."""
        if self.window is None or self.seen <= self.window:
            return buffer[:, :, : self.seen]
        head = self.slot(self.seen)
        return torch.cat((buffer[:, :, head : self.window], buffer[:, :, self.sinks : head]), dim=2)

    @property
    def first(self) -> int:
        """Index of the first token that :meth:`ordered` returns."""
        if self.window is None or self.local is None or self.seen <= self.window:
            return 0
        return self.seen - self.local

    # --- writing ---------------------------------------------------------------------------------

    def append(
        self, raw_keys: Tensor, values: Tensor, call: LayerCall, *, provisional: bool = False
    ) -> LayerView:
        """Take in the n tokens of one forward and return what its queries may see.

        Parameters
        ----------
        raw_keys, values : Tensor
            Shape (batch, key-value heads, n, d).
        call : LayerCall
            The layer's rotation and the rows' padding in this forward.
        provisional : bool
            Keep the tokens aside until :meth:`commit` or :meth:`rollback`.
        """
        rotation = call.rotation
        self.follow(rotation, raw_keys.shape[2])
        if self.pending is not None:
            raw_keys = torch.cat((self.pending[0], raw_keys), dim=2)
            values = torch.cat((self.pending[1], values), dim=2)
        if provisional:
            self.pending = (raw_keys, values)
        n = raw_keys.shape[2]
        if call.branches is not None:
            keys = rotation.turned(raw_keys, self.branch_angles(raw_keys, call))
            return LayerView(self, call, self.seen + call.branches.height, (keys, values, raw_keys))
        keys = self.rotated(raw_keys, self.seen, call)
        if n == 1 and not provisional and not torch.is_grad_enabled():
            self.put(keys, values, raw_keys, call.pads)
            return LayerView(self, call, stop=self.seen, new=None)
        self._fill_sinks(raw_keys, values, call.pads)
        return LayerView(self, call, stop=self.seen + n, new=(keys, values, raw_keys))

    def begin_with(self, keys: Tensor, values: Tensor, rotation: Rotation) -> None:
        """Hold keys and values that no forward made as those of the first tokens.

        Parameters
        ----------
        keys, values : Tensor
            Shape (batch, key-value heads, n, d); keys stand rotated at 0 to n - 1 after the start. A gradient
            flows into them where one is wanted, until the next token settles.
        rotation : Rotation
            The layer's.
        """
        raw_keys = rotation.undo(keys, torch.arange(self.start, self.start + keys.shape[2]))
        self.settle(self.append(raw_keys, values, LayerCall(0, rotation)))
        if keys.requires_grad or values.requires_grad:
            assert self.window is None or keys.shape[2] <= self.window, "they are all at hand"
            self.keys, self.values = keys, values

    def put(self, keys: Tensor, values: Tensor, raw_keys: Tensor, pads: tuple[int, ...] | None) -> None:
        """Write one token a row, rotated and raw, into its slot, over the one that leaves the window."""
        self._fill_sinks(raw_keys, values, pads)
        self._reserve(self.seen + 1, keys, values)
        assert self.keys is not None and self.values is not None
        at = self.let_go()
        self.keys.narrow(2, at, 1).copy_(keys)
        self.values.narrow(2, at, 1).copy_(values)
        if self.raw is not None:
            self.raw.narrow(2, at, 1).copy_(raw_keys)
        self.seen += 1

    def let_go(self) -> int:
        """Return the slot of the next token; the one that stands in it has left for the tier, if need be."""
        at = self.slot(self.seen)
        if self.tier is not None and self.window is not None and self.seen >= self.window:
            assert self.raw is not None and self.values is not None
            self.tier.append(self.raw[:, :, at : at + 1], self.values[:, :, at : at + 1])
        return at

    def put_at(self, slot: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write one token a row into the slot that a tensor of shape (1,) names; it is not counted."""
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, slot, keys.to(self.keys.dtype))
        self.values.index_copy_(2, slot, values.to(self.values.dtype))

    def follow(self, rotation: Rotation, n: int) -> None:
        """Bring the stored keys to this forward's table and, when the frame is long, to a new origin."""
        old, new = self.frequencies, rotation.frequencies
        if old is not None and new is not None and not new.same_as(old) and self.seen:
            assert self.keys is not None
            held, at = self.keys[:, :, : self.held], self.places()
            raw = Rotation(old, self.layout).undo(held, at) if self.raw is None else self.raw
            held.copy_(rotation(raw[:, :, : self.held], at))
        self.frequencies, self.layout = new, rotation.layout
        if self.local is not None and self.keys is not None and self.outgrows_frame(n):
            shift = self.frame(max(0, self.seen - self.local))
            if shift > 0:
                held = self.keys[:, :, : self.held]
                held.copy_(rotation.move(held, -shift))
                self.origin += shift

    def rotated(self, x: Tensor, begin: int, call: LayerCall) -> Tensor:
        """Rotate raw queries or keys of the tokens from `begin` on to where keys stand in the frame."""
        return call.rotation(x, range(self.frame(begin), self.frame(begin + x.shape[2])))

    def places(self) -> Tensor:
        """Return where the key in each slot stands in the frame, shape (n,) or (batch, n)."""
        tokens = torch.arange(self.held)
        if self.window is not None and self.local is not None and self.seen > self.window:
            ring = torch.arange(self.seen - self.local, self.seen)
            tokens[self.sinks + (ring - self.sinks) % self.local] = ring
        return tokens + (self.start - self.origin)

    def branch_angles(self, like: Tensor, call: LayerCall) -> Angles:
        """Return what rotates the tokens of a forward's branches to their places."""
        assert call.branches is not None
        key = "branches", id(call.rotation.frequencies), self.frame(self.seen), like.device
        if key not in call.memo:
            call.memo[key] = call.rotation.angles(self.frame(self.seen) + call.branches.depths, like)
        angles: Angles = call.memo[key]
        return angles

    def settle(self, view: LayerView) -> None:
        """Copy the tokens of a forward into the ring; what they push out goes to the tier below."""
        if view.new is None or self.pending is not None:
            return
        stop, local = view.stop, self.local
        if self.tier is not None and local is not None:
            begin, end = self.sinks + len(self.tier), stop - local
            if end > begin:
                self.tier.append(view.raw(begin, end), view.values(begin, end))
        new_keys, new_values, new_raw = view.new
        self._reserve(stop, new_keys, new_values)
        begin = self.seen
        if local is not None and stop - local > begin:
            self._write(begin, min(self.sinks, stop), new_keys, new_values, new_raw)
            begin = max(stop - local, min(self.sinks, stop), self.seen)
        self._write(begin, stop, new_keys, new_values, new_raw)
        self.seen = stop

    def commit(self, which: list[int] | None, pads: tuple[int, ...] | None) -> None:
        """Settle the provisional tokens numbered `which`, in that order (None: all)."""
        if self.pending is None:
            return
        raw_keys, values = self.pending
        self.rollback()
        if which is not None:
            picked = torch.tensor(which, dtype=torch.long, device=raw_keys.device)
            raw_keys, values = raw_keys[:, :, picked], values[:, :, picked]
        if raw_keys.shape[2]:
            call = LayerCall(0, Rotation(self.frequencies, self.layout), pads)
            self.settle(self.append(raw_keys, values, call))

    def rollback(self) -> None:
        """Forget the provisional tokens."""
        self.pending, self.ready = None, self.ready.anew()

    def pick_rows(self, rows: Tensor) -> None:
        """Keep the given rows of the batch, in that order (repeats allowed)."""
        for name in _BUFFERS:
            buffer = getattr(self, name)
            if buffer is not None:
                setattr(self, name, buffer[rows.to(buffer.device)])
        if self.pending is not None:
            at = rows.to(self.pending[0].device)
            self.pending = (self.pending[0][at], self.pending[1][at])
        self.index = {name: notes[rows.to(notes.device)] for name, notes in self.index.items()}
        self.ready = self.ready.anew()
        if self.tier is not None:
            self.tier.pick_rows(rows)

    # --- accounts and state ----------------------------------------------------------------------

    def nbytes(self) -> dict[str, int]:
        """Bytes held, by tier: ``window`` (all that is at hand), ``ram`` and ``disk``."""
        held = [getattr(self, name) for name in _BUFFERS] + list(self.pending or ())
        window = sum(buffer.nbytes for buffer in (*held, *self.index.values()) if buffer is not None)
        window += self.ready.nbytes()
        return {"window": window, **(_NOTHING if self.tier is None else self.tier.nbytes())}

    def nbytes_at(self, tokens: int) -> dict[str, int]:
        """Bytes it will hold when `tokens` were seen, by tier, spare room aside; asked once some were."""
        assert self.keys is not None and self.values is not None
        held = tokens if self.window is None else min(tokens, self.window)
        buffers = self.keys, self.values
        keys, values = (buffer.nbytes // buffer.shape[2] for buffer in buffers)
        sinks = sum(buffer.nbytes for buffer in (self.sink_keys, self.sink_values) if buffer is not None)
        below = _NOTHING if self.tier is None else self.tier.nbytes_at(tokens - held, buffers)
        return {"window": held * ((1 + self.keep_raw) * keys + values) + sinks, **below}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and numbers from which :meth:`load` continues bit by bit."""
        if self.pending is not None:
            raise StateError("provisional tokens cannot be saved: commit or roll back first")
        tensors = {
            name: (buffer[:, :, : self.held] if name in ("keys", "values", "raw") else buffer).clone()
            for name in _BUFFERS
            if (buffer := getattr(self, name)) is not None
        }
        tensors |= {f"index.{name}": notes.clone() for name, notes in self.index.items()}
        numbers: dict[str, Any] = {"seen": self.seen, "start": self.start, "origin": self.origin}
        if self.tier is not None:
            below, numbers["tier"] = self.tier.state()
            tensors.update(below)
        return tensors, numbers

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any], rotation: Rotation) -> None:
        """Take over what :meth:`state` returned."""
        self.frequencies, self.layout = rotation.frequencies, rotation.layout
        self.seen, self.start, self.origin = (int(numbers[key]) for key in ("seen", "start", "origin"))
        for name in _BUFFERS:
            setattr(self, name, tensors[name].clone() if name in tensors else None)
        if self.keys is not None and self.values is not None:
            self._reserve(self.held + 1, self.keys, self.values)
        notes = {name.removeprefix("index."): x for name, x in tensors.items() if name.startswith("index.")}
        self.index = {name: x.clone() for name, x in notes.items()}
        if self.tier is not None:
            if "tier" not in numbers:
                raise StateError(
                    "it was saved by an earlier version, whose tier had another form: read the text again"
                )
            self.tier.load(tensors, numbers["tier"])

    def take_frame(self, other: LayerMemory) -> None:
        """Let stored keys be rotated as in `other`."""
        self.frequencies, self.layout, self.origin = other.frequencies, other.layout, other.origin

    # --- inside ----------------------------------------------------------------------------------

    def _fill_sinks(self, raw_keys: Tensor, values: Tensor, pads: tuple[int, ...] | None) -> None:
        """Store the raw keys and the values of the sinks among the new tokens."""
        begin, stop = self.seen, self.seen + raw_keys.shape[2]
        if not self.sinks or begin >= self.sinks + max(pads or (0,)):
            return
        if self.sink_keys is None or self.sink_values is None:
            batch, heads, _, size = raw_keys.shape
            with torch.inference_mode(False):
                self.sink_keys = raw_keys.new_zeros(batch, heads, self.sinks, size)
                self.sink_values = values.new_zeros(batch, heads, self.sinks, values.shape[-1])
        for row in range(raw_keys.shape[0]):
            pad = pads[row] if pads else 0
            low, high = max(begin, pad), min(stop, pad + self.sinks)
            if low < high:
                to, source = slice(low - pad, high - pad), slice(low - begin, high - begin)
                self.sink_keys[row, :, to] = raw_keys[row, :, source].detach()
                self.sink_values[row, :, to] = values[row, :, source].detach()

    def grown(self, slots: int) -> int:
        """Return how many slots there are to be, where `slots` are too few."""
        return slots + max(slots // 4, _LEAST_GROWTH)

    def _reserve(self, length: int, keys: Tensor, values: Tensor) -> None:
        """Make room for `length` tokens: buffers grow up to the window."""
        needed = length if self.window is None else min(length, self.window)
        have = 0 if self.keys is None else self.keys.shape[2]
        if have >= needed:
            return
        room = self.grown(have) if self.window is None else min(self.grown(have), self.window)
        capacity = max(needed, room)
        for name, like in (("keys", keys), ("values", values), ("raw", keys)):
            if name == "raw" and not self.keep_raw:
                continue
            old = getattr(self, name)
            with torch.inference_mode(False):  # later forwards, in whatever mode, write into it
                grown = like.new_empty((*like.shape[:2], capacity, like.shape[3]))
            if old is not None:
                grown[:, :, :have] = old
            setattr(self, name, grown)

    def _write(self, begin: int, stop: int, keys: Tensor, values: Tensor, raw_keys: Tensor) -> None:
        """Copy new tokens [begin, stop) into their slots."""
        source = slice(begin - self.seen, stop - self.seen)
        for buffer, new in ((self.keys, keys), (self.values, values), (self.raw, raw_keys)):
            if buffer is not None:
                self.put_run(buffer, begin, new[:, :, source].detach())

    def put_run(self, buffer: Tensor, begin: int, tokens: Tensor) -> None:
        """Copy consecutive tokens, the first with index `begin`, into their slots of a buffer, run by run."""
        done = 0
        for run in self.runs(begin, begin + tokens.shape[2]):
            count = run.stop - run.start
            buffer[:, :, run] = tokens[:, :, done : done + count]
            done += count
