"""The shortest way through a layer: one token a row, in a window that needs neither mask nor merge.

Writing is this, token after token. A step knows what all layers with the same policy and rotation have in
common, and leaves each the least it can: rotate, put away, attend to the slots as they lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from everlong.attention.layer_memory import LayerMemory
from everlong.attention.parts import attend_all
from everlong.attention.policy import Policy
from everlong.attention.positions import Angles, Rotation


@dataclass(frozen=True, eq=False)
class TokenStep:
    """One step of writing in the layers of one policy; made by :func:`token_step`.

    Attributes
    ----------
    rotation : Rotation
        The layers'.
    seen, origin : int
        Where their memories stand: tokens before this one, and the frame's origin.
    slots : int
        Slots that are seen, from the first on, this token's included.
    here : Angles
        What rotates this token's query and key.
    sinks : Angles
        What rotates the sinks, where they keep their distance.
    moves_sinks : bool
        Whether they do.
    pads : tuple of int or None
        The rows' padding.
    """

    rotation: Rotation
    seen: int
    origin: int
    slots: int
    here: Angles
    sinks: Angles
    moves_sinks: bool
    pads: tuple[int, ...] | None

    def fits(self, memory: LayerMemory) -> bool:
        """Whether `memory` stands where the step was made for."""
        return (
            type(memory) is LayerMemory
            and memory.tier is None
            and not memory.keep_raw
            and (memory.seen, memory.origin) == (self.seen, self.origin)
        )

    def attend(
        self,
        memory: LayerMemory,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        softcap: float | None,
        sink_logits: Tensor | None,
    ) -> Tensor:
        """Put the token into a layer's memory, and attend; parameters as of :meth:`Forward.attend`."""
        memory.put(self.rotation.turned(key, self.here), value, key, self.pads)
        keys, values = memory.keys, memory.values
        assert keys is not None and values is not None
        if self.moves_sinks:
            assert memory.sink_keys is not None and memory.sink_values is not None
            keys.narrow(2, 0, memory.sinks).copy_(self.rotation.turned(memory.sink_keys, self.sinks))
            if self.pads:  # padding stood in their slots
                values.narrow(2, 0, memory.sinks).copy_(memory.sink_values)
        if self.slots < keys.shape[2]:
            keys, values = keys.narrow(2, 0, self.slots), values.narrow(2, 0, self.slots)
        turned = self.rotation.turned(query, self.here)
        return attend_all(turned, keys, values, scaling=scaling, softcap=softcap, sink_logits=sink_logits)


def token_step(
    policy: Policy, memory: LayerMemory, rotation: Rotation, like: Tensor, pads: tuple[int, ...] | None
) -> TokenStep | None:
    """Return the step that a window like `memory` takes; None: it needs more than the shortest way.

    Parameters
    ----------
    policy : Policy
        Which query sees what.
    memory : LayerMemory
        Of one of the layers, about to take in one token a row; its keys follow `rotation` already.
    rotation : Rotation
        The layers'.
    like : Tensor
        A query.
    pads : tuple of int or None
        The rows' padding.
    """
    if torch.is_grad_enabled():
        return None
    index = memory.seen
    distances = policy.in_place(index - max(pads or (0,)), index)
    is_full = memory.window is not None and index >= memory.window
    if distances is None or (pads and any(pads) and not is_full):
        return None
    at = memory.frame(index)
    positions = [at - distance for distance in distances]
    run = range(positions[0], positions[0] + len(positions)) if positions else range(0)
    sinks: Angles = None
    if len(set(positions)) == 1:
        sinks = rotation.angles(positions[0], like)
    elif positions:
        sinks = rotation.angles(run if positions == list(run) else torch.tensor(positions), like)
    return TokenStep(
        rotation,
        index,
        memory.origin,
        memory.window if is_full and memory.window is not None else index + 1,
        rotation.angles(at, like),
        sinks,
        bool(positions),
        pads if pads and any(pads) else None,
    )
