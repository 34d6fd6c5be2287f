"""The shortest way through a layer that recalls, while what it recalled stays: one token a row.

Of some tokens that are written the first asks what to recall. The others find it made ready, behind the sinks
and rotated to where all of it is seen, and need nothing but that and the latest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from everlong.attention import compiled_standing
from everlong.attention.layer_memory import LayerMemory
from everlong.attention.parts import Logits, Part, attend
from everlong.attention.policy import Policy
from everlong.attention.positions import Angles, Rotation
from everlong.attention.token_step import turned
from everlong.kernels.standing import Shown


@dataclass(frozen=True, eq=False)
class StandingStep:
    """One step of writing in the layers of one policy; made by :func:`standing_step`.

    Attributes
    ----------
    policy : Policy
        Says which memories it fits.
    rotation : Rotation
        The layers'.
    seen, origin : int
        Where their memories stand: tokens before this one, and the frame's origin.
    latest, distance : int
        Tokens that are seen beside what stands, this one included; and how far before it that stands.
    here : Angles
        What rotates this token's query and key.
    far : Angles
        What rotates its query to where it sees what stands.
    pads : tuple of int or None
        The rows' padding.
    may_compile : bool
        Whether compiled kernels rotate to where it stands and sees from.
    """

    policy: Policy
    rotation: Rotation
    seen: int
    origin: int
    latest: int
    distance: int
    here: Angles
    far: Angles
    pads: tuple[int, ...] | None
    may_compile: bool

    def fits(self, memory: LayerMemory, layer: int) -> bool:
        """Whether the memory of a layer stands where the step was made for, and what it recalled stays."""
        return (
            memory.seen == self.seen
            and memory.origin == self.origin
            and memory.pending is None
            and self.policy.standing(memory, layer, self.pads) == (self.latest, self.distance)
            and memory.ready.stays(memory, self.rotation)
        )

    def attend(
        self, memory: LayerMemory, query: Tensor, key: Tensor, value: Tensor, **logits: Unpack[Logits]
    ) -> Tensor:
        """Put the token into a layer's memory, and attend; parameters as of :meth:`Forward.attend`."""
        compiled = self._compiled(memory, query, key, value, **logits)
        if compiled is not None:
            return compiled
        turned_query, turned_key = turned(query, key, self.rotation, self.here)
        memory.put(turned_key, value, key, self.pads)
        keys, values = memory.keys, memory.values
        assert keys is not None and values is not None
        runs = memory.runs(memory.seen - self.latest, memory.seen)
        parts = [Part(self.rotation.turned(query, self.far), *memory.ready.standing())]
        parts += [Part(turned_query, keys[:, :, run], values[:, :, run]) for run in runs]
        return attend(parts, **logits)

    def _compiled(
        self, memory: LayerMemory, query: Tensor, key: Tensor, value: Tensor, **logits: Unpack[Logits]
    ) -> Tensor | None:
        """Do the same by compiled kernels; None: they do not take this, and nothing was done."""
        keys, values, raw, ready = memory.keys, memory.values, memory.raw, memory.ready
        is_plain = logits.get("softcap") is None and logits.get("sink_logits") is None
        if not (self.may_compile and is_plain):
            return None
        assert keys is not None and values is not None and raw is not None
        assert self.here is not None and self.far is not None
        shown = Shown(query.shape[1], keys, values, raw, *ready.standing(), self.latest, logits["scaling"])
        call = ready.call = compiled_standing.standing_call(ready.call, shown, query, key, value)
        if call is None:
            return None
        slot = memory.let_go()
        runs = memory.runs(memory.seen + 1 - self.latest, memory.seen + 1)
        output = call.attend(query, key, value, self.here, self.far, slot, runs)
        memory.seen += 1
        return output


def standing_step(
    policy: Policy,
    memories: Sequence[tuple[int, LayerMemory]],
    rotation: Rotation,
    like: Tensor,
    pads: tuple[int, ...] | None,
) -> StandingStep | None:
    """Return the step that layers like these take; None: they ask, or need more than the shortest way.

    Parameters
    ----------
    policy : Policy
        Which query sees what.
    memories : sequence of tuple of int and LayerMemory
        Layers and their memories, about to take in one token a row; keys follow `rotation` already.
    rotation : Rotation
        The layers'.
    like : Tensor
        A query.
    pads : tuple of int or None
        The rows' padding.
    """
    if torch.is_grad_enabled():
        return None
    layer, memory = memories[0]
    stands = policy.standing(memory, layer, pads)
    if stands is None:
        return None
    here, far = (rotation.angles(at, like) for at in (memory.frame(memory.seen), stands[1]))
    may_compile = compiled_standing.turns(rotation.layout, like.shape[-1], here, far)
    return StandingStep(policy, rotation, memory.seen, memory.origin, *stands, here, far, pads, may_compile)
