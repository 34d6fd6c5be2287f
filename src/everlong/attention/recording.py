"""Records a step of writing once it is static, and repeats it without Python in between.

A recording is believed only once it gives what an eager step gives: it is recorded at the place of the next
token, with another token, and then held against the eager step at this one's, so that a number that was baked
in shows. Whatever does not fit it, or fails, runs eagerly.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from everlong.attention.aim import Aim, aims, next_aims, one_further
from everlong.attention.cache import StreamCache
from everlong.attention.cache_interface import HALF_DONE
from everlong.attention.call_tape import CallTapes
from everlong.attention.cuda_graphs import CudaGraphs, has_graphs
from everlong.attention.forward import Layers
from everlong.attention.open_recording import OpenStepRecorder
from everlong.attention.recordable import ROUNDED, Recorded, Run, agree, is_plain
from everlong.attention.static_step import StaticStep
from everlong.errors import UnsupportedUseError
from everlong.models.watch import ModelWatch

_WATCHED = 8  # adapters


class Recorder(Protocol):
    """Records what a device is given to do, such as :class:`~everlong.attention.cuda_graphs.CudaGraphs`.

    Attributes
    ----------
    eager_steps : int
        Static steps that run eagerly before one is recorded: few tokens are not worth a recording.
    follows_tensors : bool
        Whether what is repeated reads tensors wherever they lie by then.
    grows : bool
        Whether it records steps in windows that are not full, too.
    """

    eager_steps: int
    follows_tensors: bool
    grows: bool

    def run(self, run: Callable[[], Tensor]) -> Tensor:
        """Run something as it would be recorded, and return what it returns."""

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Run something some times, and record it.

        Parameters
        ----------
        run : callable
            Works on tensors that stay where they are.

        Returns
        -------
        tuple of callable and Tensor
            What repeats it, and where its output will be then.

        Raises
        ------
        UnsupportedUseError
            It cannot be recorded, by its nature.
        Exception
            The device fails.
        """


@dataclass(eq=False)
class StaticRecorded(Recorded[StaticStep]):
    """What is known of the next steps of a cache, where they are static.

    Attributes
    ----------
    latest : list of Aim
        Of the last step that was repeated.
    """

    latest: list[Aim] = field(default_factory=list)


class StepRecorder:
    """Runs one token a row, of any cache of an attached model: repeated where it can be.

    Static steps are recorded whole, others but for their attention.

    Parameters
    ----------
    recorder : Recorder or None
        How static steps are recorded; None: they are not.
    watch : callable
        Returns a new :class:`ModelWatch` of the model.
    layers : Layers
        The model's.
    owner : str
        The attachment.

    Attributes
    ----------
    open : OpenStepRecorder
        What runs steps that are not static.
    """

    def __init__(
        self, recorder: Recorder | None, watch: Callable[[], ModelWatch], layers: Layers, owner: str
    ) -> None:
        self.recorder = recorder
        self._grows = True  # until it failed
        self._owner = owner
        self._new_watch = watch
        self._watches: dict[str | None, ModelWatch] = {}
        """By adapter: with each, the model looks different."""
        self._layers = layers
        opener = recorder if isinstance(recorder, CallTapes) else None
        self.open = OpenStepRecorder(opener, self._watch, layers, owner)

    def run(
        self, cache: StreamCache, ids: Tensor, run: Run, output: str, *, undisturbed: bool = False
    ) -> Tensor:
        """Run `ids`, shape (rows, 1).

        Parameters
        ----------
        cache : StreamCache
            What they go on from.
        ids : Tensor
            The tokens.
        run : callable
            The eager step.
        output : str
            What it returns, by some name.
        undisturbed : bool
            Whether nothing but Everlong's own code has run since the last step of `cache`: then neither
            the model nor the cache is looked at as closely.

        Returns
        -------
        Tensor
            What `run` returns.
        """
        recorder = self.recorder
        if recorder is None:
            return self.open.run(cache, ids, run, output, undisturbed=undisturbed)
        found = self._next(cache, ids, output) if undisturbed else None
        if found is not None:
            return self._repeat(cache, ids, found)
        found = self._aims(cache, ids)
        if found is None:
            if cache.recorded is not None and not cache.recorded.step.is_held:
                cache.recorded = None  # it would hold on to buffers that nobody else needs
            return self.open.run(cache, ids, run, output, undisturbed=undisturbed)
        recorded = self._recorded(cache, ids, found, output, recorder)
        if recorded is None:
            return run(cache, ids)
        if recorded.replay is None:
            recorded.eager += 1
            if recorded.eager <= recorder.eager_steps:
                return run(cache, ids)
            return self._record(cache, ids, run, recorded, found, recorder)
        return self._repeat(cache, ids, found)

    def stop(self) -> None:
        """Let every step run by itself from now on."""
        self.recorder = self.open.recorder = None

    def forget_growing(self, cache: StreamCache) -> None:
        """Let go of what was recorded in windows that are to take in many tokens, and get larger buffers."""
        if cache.recorded is not None and cache.recorded.step.grows:
            cache.recorded = None

    def _repeat(self, cache: StreamCache, ids: Tensor, found: list[Aim]) -> Tensor:
        """Run what was recorded."""
        recorded = cache.recorded
        assert recorded is not None and recorded.replay is not None and recorded.result is not None
        cache.begin(len(ids), cache.pads)
        try:
            recorded.step.aim_at(ids, found)
            recorded.replay()
        finally:
            cache.abandon()
        recorded.step.count()
        cache.end(1)
        recorded.latest, recorded.seen = found, cache.seen
        cache.recorded_open = None  # of rows that were padded, or other windows, before
        return recorded.result.clone()  # the next step writes over it

    def _next(self, cache: StreamCache, ids: Tensor, output: str) -> list[Aim] | None:
        """Return where the tokens go that follow a step which was repeated; None: that is to be looked at."""
        recorded = cache.recorded
        if recorded is None or (recorded.output, recorded.seen) != (output, cache.seen):
            return None
        if recorded.step.adapter != cache.adapter or not is_plain(cache, ids, self._owner):
            return None
        if recorded.glance != self._watch(cache.adapter).glance():
            return None
        found = next_aims(recorded.latest, cache.pads)
        return found if found is not None and recorded.step.takes(found) else None

    def _aims(self, cache: StreamCache, ids: Tensor) -> list[Aim] | None:
        """Return where a static step would put the tokens; None: it runs eagerly, or is refused there."""
        if not is_plain(cache, ids, self._owner):
            return None
        grows = self._grows and self.recorder is not None and self.recorder.grows
        return aims(cache, self._layers, growing=grows)

    def _recorded(
        self, cache: StreamCache, ids: Tensor, found: list[Aim], output: str, recorder: Recorder
    ) -> StaticRecorded | None:
        """Return what is known of this step, from now on if it is another one than before; None: nothing."""
        watch = self._watch(cache.adapter)
        glance = watch.glance()  # first: another thread may change something meanwhile
        state, known = watch.state(lying_still=not recorder.follows_tensors), cache.recorded
        if state is None:
            cache.recorded = None
        elif known is None or (known.output, known.model_state) != (output, state):
            cache.recorded = StaticRecorded(output, state, StaticStep(cache, found))
        elif not known.step.is_of(cache, found, ids):
            step = StaticStep(cache, found)
            goes_on = known.replay is not None and known.step.grows and step.grows and not known.step.is_held
            cache.recorded = StaticRecorded(output, state, step, recorder.eager_steps if goes_on else 0)
        if cache.recorded is not None:
            cache.recorded.glance = glance
        return cache.recorded

    def _watch(self, adapter: str | None) -> ModelWatch:
        """Return what watches the model while an adapter is active."""
        found = self._watches.get(adapter)
        if found is None:
            if len(self._watches) == _WATCHED:
                del self._watches[next(iter(self._watches))]
            found = self._watches[adapter] = self._new_watch()
        return found

    def _record(
        self,
        cache: StreamCache,
        ids: Tensor,
        run: Run,
        recorded: StaticRecorded,
        found: list[Aim],
        recorder: Recorder,
    ) -> Tensor:
        """Run eagerly, and record for the steps to come; the windows are held twice meanwhile."""
        expected, step = run(cache, ids), recorded.step
        after: list[Tensor] = []
        reason = "it gave something else than the eager step"
        cache.unfit = HALF_DONE
        try:
            buffers = step.buffers(found)
            after += [buffer.clone() for buffer in buffers]
            step.aim_at(torch.zeros_like(ids), [one_further(aim) for aim in found])
            replay, result = recorder.record(lambda: run(step, step.ids))

            def again(once: Callable[[], object]) -> object:
                """Run the step from what stood before it, with blanks where it writes."""
                for buffer, kept in zip(buffers, after, strict=True):
                    buffer.copy_(kept)
                step.blank(found)
                step.aim_at(ids, found)
                return once()

            again(replay)
            is_right = agree(result, expected) and all(map(agree, buffers, after))
            if not is_right and self._watch(cache.adapter).rounds:
                # Kernels and eager steps may round otherwise: the same step, not recorded, stands between.
                ours = [x.clone() for x in (result, *step.written(found))]
                theirs = again(lambda: recorder.run(lambda: run(step, step.ids)))
                assert isinstance(theirs, Tensor)
                is_right = (
                    all(map(agree, ours, (theirs, *step.written(found))))
                    and agree(theirs, expected, ROUNDED)
                    and all(agree(x, kept, ROUNDED) for x, kept in zip(buffers, after, strict=True))
                )
            if is_right:
                recorded.replay, recorded.result = replay, result
        except UnsupportedUseError:  # as with experts that are chosen by Python: nothing is amiss
            reason = ""
        except Exception as error:  # a device has many ways to refuse
            reason = f"{type(error).__name__}: {error}"
        finally:
            for buffer, kept in zip(step.buffers(found), after, strict=False):
                buffer.copy_(kept)
            cache.unfit = ""
        if recorded.replay is None:
            cache.recorded = None
            if step.grows:
                self._grows = False
            else:
                self.stop()
            if reason:
                until = " until windows are full" if step.grows else ""
                warnings.warn(
                    f"a recorded step of writing was dropped, and each step runs by itself{until}: {reason}",
                    stacklevel=2,
                )
        return expected


def recorder_for(device: torch.device) -> Recorder | None:
    """Return what records steps on `device`; None: nothing does."""
    if device.type == "cpu":
        return CallTapes()
    return CudaGraphs(device) if device.type == "cuda" and has_graphs() else None
