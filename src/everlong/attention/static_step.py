"""One step of writing as a function of tensors alone, so that a device may record it and repeat it.

A step differs from the next in its tokens, in the slot these are put into, in a few angles, and, until the
window is full, in how many slots are seen. Here those stand in tensors that are written before a step.
Everything else that the step reads or writes, the rings of the memories among it, stays where it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import is_
from typing import Any, Unpack

import torch
from torch import Tensor

from everlong.attention.aim import Aim
from everlong.attention.cache import StreamCache
from everlong.attention.forward import Layers, Underway
from everlong.attention.inputs import Inputs
from everlong.attention.layer_memory import LayerMemory
from everlong.attention.parts import Logits
from everlong.attention.positions import Angles, working_dtype
from everlong.attention.recordable import RecordableStep
from everlong.attention.token_step import TokenStep, rotated_sinks
from everlong.errors import UnsupportedUseError

_AHEAD = 256  # positions, of as many tokens as that is for


class _Kind:
    """Layers that are alike, and the tensors that say where their next token goes."""

    def __init__(self, aim: Aim, pads: tuple[int, ...] | None) -> None:
        self.memories = aim.memories
        self._rotation = aim.rotation
        self._grows = aim.grows
        self._pads = pads
        first = next(iter(aim.memories.values()))
        assert first.keys is not None
        self._slots = first.keys.shape[2]
        self._like = torch.empty(0, dtype=first.keys.dtype)  # angles are computed on the CPU
        device, dtype = first.keys.device, working_dtype(first.keys)
        self._slot = torch.zeros(1, dtype=torch.long, device=device)
        self._count = torch.full_like(self._slot, aim.place.slots)
        self._has_sinks = aim.place.sinks is not None
        self._here: Angles = None
        self._sinks: Angles = None
        self._ahead: tuple[Any, Angles] = (None, None)
        angles = self._angles(aim)
        if angles is not None:
            width = angles[0].shape[-1]
            self._here, self._sinks = (
                (_zeros(count, width, dtype, device), _zeros(count, width, dtype, device))
                for count in (1, first.sinks if self._has_sinks else 0)
            )

    def aim_at(self, aim: Aim) -> None:
        """Write where the next token goes."""
        self._slot.fill_(aim.place.slot)
        if self._grows:
            self._count.fill_(aim.place.slots)
        angles = self._angles(aim)
        if angles is not None:
            cos, sin = angles
            _copy(self._here, (cos[:1], sin[:1]))
            if self._has_sinks:
                _copy(self._sinks, (cos[1:], sin[1:]))  # one for all where they stand at one place

    def _angles(self, aim: Aim) -> Angles:
        """Return what rotates the token, and behind it the sinks, each to where it stands.

        Tables are made for some tokens at once, as a call takes longer than what it computes.
        """
        at, sinks = aim.place.at, aim.place.sinks
        places = [] if sinks is None else [sinks] if isinstance(sinks, int) else [int(x) for x in sinks]
        offsets = [0, *(place - at for place in places)]
        tokens = max(1, _AHEAD // len(offsets))
        block, row = divmod(at, tokens)
        key = aim.rotation.frequencies, block, offsets
        if self._ahead[0] != key:
            ahead = torch.arange(block * tokens, (block + 1) * tokens)[:, None] + torch.tensor(offsets)
            self._ahead = key, aim.rotation.angles(ahead, self._like)
        tables = self._ahead[1]
        return None if tables is None else (tables[0][row, 0], tables[1][row, 0])

    def step(self) -> TokenStep:
        """Return the step, the sinks rotated to where they are to stand."""
        sinks = {}
        if self._has_sinks:
            sinks = rotated_sinks(list(self.memories.values()), self._rotation, self._sinks)
        common = self._rotation, 0, 0, self._slots, self._here, sinks, self._pads
        return TokenStep(*common, self._slot, self._count, self._grows)

    def is_of(self, aim: Aim) -> bool:
        """Whether `aim` differs in nothing but numbers that are written before a step."""
        return (
            aim.grows == self._grows
            and (aim.grows or aim.place.slots == self._slots)
            and (aim.place.sinks is not None) == self._has_sinks
            and (aim.rotation.frequencies is None) == (self._here is None)
            and aim.rotation.layout == self._rotation.layout
        )


class StaticStep(RecordableStep):
    """What a forward is given as its cache when it runs one token a row, to be recorded.

    Parameters
    ----------
    cache : StreamCache
        Whose windows they are.
    found : list of Aim
        From :func:`~everlong.attention.aim.aims`.

    Attributes
    ----------
    grows : bool
        Whether some windows are not full.
    """

    def __init__(self, cache: StreamCache, found: list[Aim]) -> None:
        super().__init__(cache, _buffers(found[0])[0].device, position_rows=1)
        self.pads = _real(cache.pads)
        self.grows = any(aim.grows for aim in found)
        self._span, self._folded = cache.policy.span, cache.folded
        self._memories = list(cache.memories.values())
        self._held = self._tensors()
        with torch.inference_mode(False):  # later steps, in whatever mode, write into them
            self._kinds = [_Kind(aim, self.pads) for aim in found]

    def buffers(self, found: list[Aim]) -> list[Tensor]:
        """Return views of keys and values of all layers, as far as a step sees them and writes to them."""
        return [buffer[:, :, : aim.place.slots] for aim in found for buffer in _buffers(aim)]

    def is_of(self, cache: StreamCache, found: list[Aim], ids: Tensor) -> bool:
        """Whether the next step of `cache` is this one, with other numbers in its tensors."""
        return (
            ids.shape == self.ids.shape
            and cache.adapter == self.adapter
            and _real(cache.pads) == self.pads
            and cache.folded == self._folded
            and self.takes(found)
        )

    @property
    def is_held(self) -> bool:
        """Whether the memories have the tensors that it reads and writes."""
        return all(map(is_, self._held, self._tensors()))

    def takes(self, found: list[Aim]) -> bool:
        """Whether aims differ from the step's in nothing but numbers, in the same tensors of the memories."""
        return self.is_held and all(kind.is_of(aim) for kind, aim in zip(self._kinds, found, strict=True))

    def aim_at(self, ids: Tensor, found: list[Aim]) -> None:
        """Write the tokens, and where they go."""
        self.place(ids, [self._position(found)])
        for kind, aim in zip(self._kinds, found, strict=True):
            kind.aim_at(aim)

    def written(self, found: list[Aim]) -> list[Tensor]:
        """Return views of what a step writes at these places: a slot of each memory, and its sinks."""
        views = []
        for aim in found:
            views += [buffer[:, :, aim.place.slot] for buffer in _buffers(aim)]
            if aim.place.sinks is not None:
                views += [m.keys[:, :, : m.sinks] for m in aim.memories.values() if m.keys is not None]
        return views

    def blank(self, found: list[Aim]) -> None:
        """Blank what a step writes, so that it shows if one does not."""
        for view in self.written(found):
            view.zero_()

    def count(self) -> None:
        """Count the tokens that a step put in."""
        for memory in self._memories:
            memory.seen += 1

    def _tensors(self) -> list[Tensor | None]:
        """All tensors of the memories that a step reads or writes: a recording holds on to them."""
        return [
            tensor
            for memory in self._memories
            for tensor in (memory.keys, memory.values, memory.raw, memory.sink_keys, memory.sink_values)
        ]

    def _position(self, found: list[Aim]) -> int:
        """Return the position id: that of the end of the window, once it is full."""
        if not self.grows:
            assert self._span is not None
            return self._span - 1
        tokens = max(aim.place.slots for aim in found if aim.grows) - self._folded
        return (tokens if self._span is None else min(tokens, self._span)) - 1

    # --- one forward -------------------------------------------------------------------------------

    def begin(self, inputs: Inputs, layers: Layers, outer: Underway | None) -> StaticForward:
        """Enter a forward."""
        self.enter(inputs)
        steps = {}
        for kind in self._kinds:
            step = kind.step()
            steps.update({number: (step, memory) for number, memory in kind.memories.items()})
        return StaticForward(self.owner, self, steps, outer)


@dataclass
class StaticForward:
    """One forward of a static step under way; attributes as of :class:`Forward`."""

    owner: str
    cache: StaticStep
    steps: dict[int, tuple[TokenStep, LayerMemory]]
    outer: Underway | None = None
    _attended: int = 0

    def attend(
        self, number: int, query: Tensor, key: Tensor, value: Tensor, **logits: Unpack[Logits]
    ) -> Tensor:
        """Let layer `number` attend by the shortest way; parameters as of :meth:`Forward.attend`."""
        step, memory = self.steps[number]
        self._attended += 1
        return step.attend(memory, query, key, value, **logits)

    def finish(self) -> None:
        """Make sure that all layers have attended; whoever repeats the step counts its tokens."""
        if self._attended != len(self.steps):
            raise UnsupportedUseError(f"{self._attended} of {len(self.steps)} layers attended")


def _buffers(aim: Aim) -> list[Tensor]:
    """Return the keys and values of layers that are alike, and raw keys where they keep them."""
    kept = ((memory.keys, memory.values, memory.raw) for memory in aim.memories.values())
    return [buffer for buffers in kept for buffer in buffers if buffer is not None]


def _real(pads: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Return the rows' padding; None: there is none."""
    return pads if pads and any(pads) else None


def _copy(into: Angles, angles: Angles) -> None:
    if into is not None and angles is not None:
        for ours, theirs in zip(into, angles, strict=True):
            ours.copy_(theirs, non_blocking=True)


def _zeros(count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros((count, width), dtype=dtype, device=device)
