"""One step of writing whose attention is left open, so that all the rest of it may be recorded.

Where what a token sees is no fixed window (it is recalled, chosen, or padded), a layer's attention decides
anew each time, in Python. Norms, projections, MLPs and the head do not: they are the same calls for every
token. So each layer's attention is one call here, which a tape notes as any other; repeated, it hands that
layer's queries, keys and values to the forward that is under way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from everlong.attention.cache import StreamCache
from everlong.attention.forward import Forward, Layers, Underway
from everlong.attention.inputs import Inputs
from everlong.attention.parts import Logits
from everlong.attention.recordable import RecordableStep
from everlong.errors import UnsupportedUseError

Given = tuple[Tensor, Tensor, Tensor]
"""A layer's queries, keys and values, unrotated."""


class OpenStep(RecordableStep):
    """What a forward is given as its cache when it runs one token a row, to be recorded but for attention.

    Within :meth:`live` layers attend, and what they were given and gave is noted. Without, they are handed
    what was noted, and only what they are given is: so the step can be run again and again, and compared,
    while the stream stands where it is.

    Parameters
    ----------
    cache : StreamCache
        A stream that has read something.
    device : torch.device
        Where the model takes tokens.

    Attributes
    ----------
    given : dict of int to tuple of Tensor
        By layer, what its attention was given last, if that was noted.
    """

    def __init__(self, cache: StreamCache, device: torch.device) -> None:
        super().__init__(cache, device, position_rows=len(cache.pads or (0,)))
        self.given: dict[int, Given] = {}
        self._outputs: dict[int, Tensor] = {}
        self._forward: Forward | None = None
        self._takes_notes = True
        self._is_in_inference_mode = False
        self._attend = _OpenAttention(self)

    def is_of(self, cache: StreamCache, ids: Tensor) -> bool:
        """Whether the next step of `cache` is this one, with other numbers in its tensors."""
        rows = len(cache.pads or (0,))
        return (ids.shape, cache.adapter, rows) == (self.ids.shape, self.adapter, len(self._positions))

    def aim_at(self, cache: StreamCache, ids: Tensor, seen: int) -> None:
        """Write tokens that follow `seen` ones, and their positions: none that windows do not have."""
        span = cache.policy.span
        own = (max(seen - pad - cache.folded, 0) for pad in cache.pads or (0,))
        self.place(ids, [at if span is None else min(at, span - 1) for at in own])

    @contextmanager
    def live(self, forward: Forward, *, takes_notes: bool) -> Iterator[None]:
        """Let layers attend in `forward` meanwhile, in the mode of PyTorch that is set now."""
        self._forward, self._takes_notes = forward, takes_notes
        self._is_in_inference_mode = torch.is_inference_mode_enabled()
        try:
            yield
        finally:
            self._forward = None

    def noted(self) -> list[Tensor]:
        """Return what all layers were given."""
        return [x for given in self.given.values() for x in given]

    def forget_notes(self) -> None:
        """Let go of what was noted."""
        self.given, self._outputs = {}, {}

    def attend(self, number: int, given: Given, **logits: Unpack[Logits]) -> Tensor:
        """Let layer `number` attend, or hand out what it gave; what is given may be written over after."""
        if self._forward is None:
            query, key, value = (x.clone() for x in given)
            self.given[number] = query, key, value
            return self._outputs[number].clone()
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled() and not self._is_in_inference_mode:
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
            query, key, value = (x.clone() for x in given)
            output = self._forward.attend(number, query, key, value, **logits)
        if self._takes_notes:
            self.given[number], self._outputs[number] = (query, key, value), output.clone()
        return output

    # --- one forward -------------------------------------------------------------------------------

    def begin(self, inputs: Inputs, layers: Layers, outer: Underway | None) -> OpenForward:
        """Enter a forward."""
        self.enter(inputs)
        return OpenForward(self.owner, self, self._attend, len(layers), outer)


class _OpenAttention:
    """The attention of a step's layers, as a function of tensors that a tape notes."""

    __name__ = "open_attention"

    def __init__(self, step: OpenStep) -> None:
        self._step = step

    def __call__(self, *args: Any, out: Tensor | None = None) -> Tensor:
        """Attend, or let a tape that is open do it; see :meth:`OpenForward.attend` for what is given."""
        tensors = [x for x in args if isinstance(x, Tensor)]
        if has_torch_function(tensors):
            named = {} if out is None else {"out": out}
            noted: Tensor = handle_torch_function(self, tensors, *args, **named)
            return noted
        query, key, value, sink_logits, number, scaling, softcap = args
        logits = Logits(scaling=scaling, softcap=softcap, sink_logits=sink_logits)
        output = self._step.attend(number, (query, key, value), **logits)
        return output if out is None else out.copy_(output)


@dataclass
class OpenForward:
    """One forward of an open step under way; attributes as of :class:`Forward`."""

    owner: str
    cache: OpenStep
    attention: _OpenAttention
    layers: int
    outer: Underway | None = None
    _attended: int = 0

    def attend(
        self, number: int, query: Tensor, key: Tensor, value: Tensor, **logits: Unpack[Logits]
    ) -> Tensor:
        """Let layer `number` attend; parameters as of :meth:`Forward.attend`."""
        self._attended += 1
        sinks, softcap = logits.get("sink_logits"), logits.get("softcap")
        return self.attention(query, key, value, sinks, number, logits["scaling"], softcap)

    def finish(self) -> None:
        """Make sure that all layers have attended; whoever runs the step counts its tokens."""
        if self._attended != self.layers:
            raise UnsupportedUseError(f"{self._attended} of {self.layers} layers attended")
