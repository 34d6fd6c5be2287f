"""Records steps of writing but for their attention, where what a token sees is no fixed window.

As with static steps, a recording is believed only once it gives what the step gave that is not recorded. It
is held against notes of that, layer by layer, so that the stream is not touched meanwhile.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from everlong.attention.cache import StreamCache
from everlong.attention.call_tape import CallTapes
from everlong.attention.forward import Forward, Layers
from everlong.attention.open_step import OpenStep
from everlong.attention.recordable import ROUNDED, Recorded, Run, agree, is_plain
from everlong.errors import UnsupportedUseError
from everlong.models.watch import ModelWatch

Result = TypeVar("Result")


class OpenStepRecorder:
    """Runs one token a row where a step is not static; parameters as of :class:`StepRecorder`.

    Parameters
    ----------
    recorder : CallTapes or None
        What records; None: every step runs by itself.
    watch : callable
        Returns what watches the model while an adapter is active.
    layers : Layers
        The model's.
    owner : str
        The attachment.
    """

    def __init__(
        self,
        recorder: CallTapes | None,
        watch: Callable[[str | None], ModelWatch],
        layers: Layers,
        owner: str,
    ) -> None:
        self.recorder = recorder
        self._watch = watch
        self._layers = layers
        self._owner = owner

    def run(
        self, cache: StreamCache, ids: Tensor, run: Run, output: str, *, undisturbed: bool = False
    ) -> Tensor:
        """Run `ids`, shape (rows, 1), if need be eagerly; parameters and result as of `StepRecorder.run`."""
        if self.recorder is None or not is_plain(cache, ids, self._owner):
            return run(cache, ids)
        recorded = self._next(cache, ids, output) if undisturbed else None
        if recorded is None:
            recorded = self._recorded(cache, ids, output, self.recorder)
        if recorded is None:
            return run(cache, ids)
        if recorded.replay is not None:
            return self._repeat(cache, ids, recorded)
        recorded.eager += 1
        if recorded.eager <= self.recorder.eager_steps:
            return run(cache, ids)
        return self._record(cache, ids, run, recorded, self.recorder)

    def _next(self, cache: StreamCache, ids: Tensor, output: str) -> Recorded[OpenStep] | None:
        """Return a step that was repeated last, and fits without a closer look at the model."""
        known = cache.recorded_open
        if known is None or (known.output, known.seen) != (output, cache.seen):
            return None
        is_same = known.step.is_of(cache, ids) and known.glance == self._watch(cache.adapter).glance()
        return known if is_same else None

    def _recorded(
        self, cache: StreamCache, ids: Tensor, output: str, recorder: CallTapes
    ) -> Recorded[OpenStep] | None:
        """Return what is known of this step, from now on if it is another one than before; None: nothing."""
        watch = self._watch(cache.adapter)
        glance = watch.glance()  # first: another thread may change something meanwhile
        state, known = watch.state(lying_still=not recorder.follows_tensors), cache.recorded_open
        if state is None:
            cache.recorded_open = None
            return None
        is_same = known is not None and (known.output, known.model_state) == (output, state)
        if known is None or not is_same or not known.step.is_of(cache, ids):
            step = OpenStep(cache, ids.device)
            known = cache.recorded_open = Recorded(output, state, step)
        known.glance = glance
        return known

    def _repeat(self, cache: StreamCache, ids: Tensor, recorded: Recorded[OpenStep]) -> Tensor:
        """Run what was recorded, and the layers' attention."""
        replay, result = recorded.replay, recorded.result
        assert replay is not None and result is not None
        self._live(cache, ids, recorded.step, replay, takes_notes=False)
        recorded.seen = cache.seen
        cache.recorded = None  # of windows that were static before
        return result.clone()  # the next step writes over it

    def _live(
        self,
        cache: StreamCache,
        ids: Tensor,
        step: OpenStep,
        run: Callable[[], Result],
        *,
        takes_notes: bool,
    ) -> Result:
        """Run a step while its layers attend to what the cache holds, and count its tokens."""
        forward = Forward(self._owner, self._layers, cache, 1, is_kept=True)
        cache.begin(len(ids), cache.pads)
        try:
            step.aim_at(cache, ids, cache.seen)
            with step.live(forward, takes_notes=takes_notes):
                found = run()
        finally:
            cache.abandon()
        forward.finish()
        return found

    def _record(
        self, cache: StreamCache, ids: Tensor, run: Run, recorded: Recorded[OpenStep], recorder: CallTapes
    ) -> Tensor:
        """Run eagerly, and record for the steps to come."""
        step = recorded.step
        expected = self._live(cache, ids, step, lambda: run(step, step.ids), takes_notes=True)
        noted = [expected, *step.noted()]
        reason = "it gave something else than the eager step"
        try:
            step.aim_at(cache, torch.zeros_like(ids), cache.seen)
            replay, result = recorder.record(lambda: run(step, step.ids))
            step.aim_at(cache, ids, cache.seen - 1)
            step.given = {}  # lest a layer that is left out be taken for what it was given before
            replay()
            ours = [result.clone(), *step.noted()]
            is_right = _are_alike(ours, noted)
            if not is_right and self._watch(cache.adapter).rounds:
                # Kernels and eager steps may round otherwise: the same step, not recorded, stands between.
                theirs = [recorder.run(lambda: run(step, step.ids)), *step.noted()]
                is_right = _are_alike(ours, theirs) and _are_alike(theirs, noted, ROUNDED)
            if is_right:
                recorded.replay, recorded.result = replay, result
        except UnsupportedUseError:  # as with experts that are chosen by Python: nothing is amiss
            reason = ""
        except Exception as error:  # a recording has many ways to fail
            reason = f"{type(error).__name__}: {error}"
        finally:
            step.forget_notes()
        if recorded.replay is None:
            cache.recorded_open = self.recorder = None
            if reason:
                warnings.warn(
                    f"a recorded step of writing was dropped, and each step runs by itself: {reason}",
                    stacklevel=2,
                )
        return expected


def _are_alike(ours: list[Tensor], theirs: list[Tensor], *how: float) -> bool:
    """Whether two steps gave the same, as :func:`agree` has it, and in as many layers."""
    return len(ours) == len(theirs) and all(agree(x, y, *how) for x, y in zip(ours, theirs, strict=True))
