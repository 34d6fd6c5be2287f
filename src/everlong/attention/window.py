"""The common ground of policies that see some first tokens and the latest ones.

Such a policy differs from another only in where its sinks stand: at their true distance while they are
near, at a fixed distance once they are far. That is all a subclass says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from everlong.attention.layer_memory import LayerMemory
from everlong.attention.parts import Part, Partial
from everlong.attention.policy import Policy
from everlong.attention.view import LayerView, Queries


@dataclass(frozen=True)
class WindowPolicy(Policy):
    """G sinks and the latest L tokens; subclasses place the sinks."""

    takes_branches: ClassVar[bool] = True

    def shape(self) -> tuple[int, int | None]:
        """Return G and L, the sinks and the local tokens a query sees (L None: all)."""
        raise AssertionError("a subclass answers")

    def near_until(self) -> int | None:
        """Row index from which some sink is at its far distance; None: never."""
        return None

    def far_from(self) -> int | None:
        """Row index from which all sinks are at their far distance; None: never."""
        return None

    def far_distances(self) -> Sequence[int]:
        """Return the distance of each sink once it is far, in tokens."""
        return ()

    def sink_is_far(self, row_index: Tensor, sink: Tensor) -> Tensor:
        """Whether the query at `row_index` sees `sink` at its far distance; the two broadcast."""
        raise AssertionError("asked only where near_until() is not None")

    def local_ceiling(self) -> int | None:
        """Distance at which farther local keys are placed too; None: all at their true distance."""
        return None

    def memory(self, layer: int, start: int) -> LayerMemory:
        """Return an empty memory for `layer`."""
        sinks, local = self.shape()
        return LayerMemory(sinks, local, keep_raw=self.local_ceiling() is not None, start=start)

    def breaks(self) -> tuple[int, ...]:
        """End groups where the window fills, and where the sinks begin and end to move away."""
        sinks, local = self.shape()
        full = None if local is None else sinks + local
        return tuple(
            at for at in (full, self.near_until(), self.far_from(), self.local_ceiling()) if at is not None
        )

    def plain_until(self) -> int | None:
        """Return where the form changes first: before, nothing has left the window or moved."""
        return min(self.breaks(), default=None)

    def in_place(self, row_index: int, index: int) -> Sequence[int] | None:
        """All slots: before anything left the window or moved, or once all sinks keep their distance."""
        sinks, local = self.shape()
        near, far, ceiling = self.near_until(), self.far_from(), self.local_ceiling()
        if ceiling is not None:
            return None
        if (local is None or index < sinks + local) and (near is None or index < near):
            return ()
        if (
            local is None
            or row_index < sinks + local
            or not (not sinks or (far is not None and row_index >= far))
        ):
            return None
        return self.far_distances() if sinks else ()

    def parts(self, queries: Queries, view: LayerView) -> list[Part | Partial]:
        """Show the sinks, placed as the subclass says, and the local tokens."""
        sinks, local = self.shape()
        last, pads = queries.stop - 1, view.pads or (0,)
        near, far, ceiling = self.near_until(), self.far_from(), self.local_ceiling()
        in_place = view.new is None and ceiling is None
        is_full = local is not None and last >= sinks + local
        is_moved = (near is not None and last >= near) or (ceiling is not None and last > ceiling)
        if not is_full and not is_moved:
            # Nothing has left the window, all distances are true: ordinary causal attention.
            return [view.all_slots(queries)] if in_place else [*view.band(queries)]
        if in_place and is_full:
            is_far = self._far_sinks(queries, view)
            return [view.turned_window(queries, () if is_far is None else self.far_distances(), is_far)]
        first_row = queries.first - max(pads)
        settled = not sinks or (far is not None and first_row >= far)
        return [*self._sink_parts(queries, view, settled), *self._local_parts(queries, view)]

    def _sink_parts(self, queries: Queries, view: LayerView, settled: bool) -> list[Part]:
        sinks, _ = self.shape()
        if not sinks:
            return []
        if settled:
            return [view.sinks_far(queries, self.far_distances(), None)]
        is_far = self._far_sinks(queries, view)
        if is_far is None:
            return [view.sinks_near(queries, None)]
        return [view.sinks_near(queries, is_far), view.sinks_far(queries, self.far_distances(), is_far)]

    def _far_sinks(self, queries: Queries, view: LayerView) -> Tensor | None:
        """Which query sees which sink far, (batch or 1, 1, n, G); None: they are all near."""
        near, (sinks, _) = self.near_until(), self.shape()
        if near is None or queries.stop - 1 - min(view.pads or (0,)) < near:
            return None
        return self.sink_is_far(view.row_index(queries), torch.arange(sinks, device=queries.raw.device))

    def _local_parts(self, queries: Queries, view: LayerView) -> list[Part]:
        sinks, local = self.shape()
        farthest = None if local is None else local - 1
        ceiling = self.local_ceiling()
        if ceiling is None:
            return view.band(queries, farthest=farthest, lowest=sinks)
        return [
            *view.band(queries, farthest=ceiling, lowest=sinks),
            *view.band(queries, nearest=ceiling + 1, farthest=farthest, lowest=sinks, distance=ceiling),
        ]


@dataclass(frozen=True)
class LocalWindow(WindowPolicy):
    """A model's own sliding-window layers: the last `window` tokens at their true distances, no sinks."""

    window: int = 1

    def shape(self) -> tuple[int, int | None]:
        """No sinks, the whole window local."""
        return 0, self.window
