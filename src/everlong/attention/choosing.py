"""The common ground of policies that forget, and choose what to keep: how a query sees what was kept."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from everlong.attention.kept import KeptMemory
from everlong.attention.kept_view import KeptView, Stage
from everlong.attention.parts import Part, Partial
from everlong.attention.policy import Policy, require_count
from everlong.attention.view import LayerView, Queries
from everlong.errors import ConfigurationError
from everlong.kernels.blocks import Triangle

_GROUP = 64


@dataclass(frozen=True)
class ChoosingPolicy(Policy):
    """Each key-value head of each layer keeps tokens of its own choice. Subclasses say which, and when.

    A layer that uses the keys of another sees what that one kept, and has no say in it.
    """

    in_cache: ClassVar[bool] = False
    """Whether tokens stand at their place among those kept; otherwise where they stood in the stream."""

    def room(self) -> int | None:
        """Return how many slots a row and head has; None: no limit."""
        return self.span

    def memory(self, layer: int, start: int) -> KeptMemory:
        """Return an empty memory for `layer`."""
        return KeptMemory(self.room(), in_cache=self.in_cache, start=start)

    def parts(self, queries: Queries, view: LayerView) -> list[Part | Partial]:
        """Show a group what was kept, and its own tokens up to each query's."""
        assert isinstance(view, KeptView)
        return [*self.shown(queries, view, self.staged(queries, view))]

    def staged(self, queries: Queries, view: KeptView) -> Stage:
        """Return what a group of queries finds; whoever has a limit makes room here."""
        return view.stage(queries, None, 0, lambda slots: slots)

    def shown(self, queries: Queries, view: KeptView, stage: Stage) -> list[Part]:
        """Show a group the tokens of its stage: all that stand before it, then up to each query's own."""
        n, m, keys, values = stage.stop - stage.first, stage.count, stage.keys, stage.values
        placed = queries.placed
        if self.in_cache:
            placed, keys = view.rotation(queries.raw, range(m - n, m)), view.rotation(keys, range(m))
        visible = self.visible(view, stage)
        if visible is not None:
            return [Part(placed, keys, values, visible)]
        if n == 1:
            return [Part(placed, keys, values)]
        own = Part(placed, keys[:, :, m - n :], values[:, :, m - n :], Triangle.LOWER)
        return [Part(placed, keys[:, :, : m - n], values[:, :, : m - n]), own] if m > n else [own]

    def visible(self, view: KeptView, stage: Stage) -> Tensor | None:
        """Return which query sees which slot, (batch, 1, n, m), where padding lies in some; None: nowhere.

        It lies in the same slots of all heads, since it is dropped first and in a fixed order.
        """
        if view.pads is None and not view.has_dead:
            return None
        at = view.at_of(stage)[:, :1, None]
        real = at >= view.pad_column(at.device)
        if bool(real.all()):
            return None
        own = torch.arange(stage.first, stage.stop, device=at.device)[:, None]
        return real & (at <= own)

    def observe(self, queries: Queries, view: LayerView) -> None:
        """Nothing, but said: tokens that were weighed against others cannot be taken back."""
        return None


@dataclass(frozen=True)
class StreamChoosingPolicy(ChoosingPolicy):
    """Keeps at most W tokens at any time: G sinks, the latest R, and between them those worth most.

    Before a group of n queries attends, each head drops what is worth least until W - n tokens are left;
    while writing n is 1. Subclasses are dataclasses with the fields ``sinks``, ``window``, ``recent`` and
    ``group``.
    """

    def __post_init__(self) -> None:
        name = type(self).__name__
        require_count(name, "sinks", self._field("sinks"), least=0)
        for field in ("window", "recent", "group"):
            require_count(name, field, getattr(self, field), least=1, optional=True)

    def _field(self, name: str) -> int:
        value: int = getattr(self, name)
        return value

    def _with_window(self, training_length: int | None) -> Self:
        return super().resolve(training_length)

    def resolve(self, training_length: int | None) -> Self:
        """Fill in the window, and from it the latest tokens and the group."""
        resolved = self._with_window(training_length)
        window, sinks = resolved._field("window"), resolved._field("sinks")
        recent, group = (getattr(resolved, name) for name in ("recent", "group"))
        if recent is None:
            recent = max(1, (window - sinks) // 2)
        if group is None:
            group = min(_GROUP, max(1, recent // 2))
        if sinks + recent >= window or group > recent:
            raise ConfigurationError(
                f"{type(self).__name__}: a window of {window} cannot hold {sinks} sinks, the latest {recent} "
                f"tokens, among them a group of {group}, and one more to choose; use a larger window, fewer "
                "sinks, a smaller recent, or a group of at most recent"
            )
        return replace(resolved, **{"recent": recent, "group": group})

    def breaks(self) -> tuple[int, ...]:
        """End groups where the window is full."""
        return (self._field("window"),)

    def plain_until(self) -> int | None:
        """Return W: before, queries see all there is."""
        return self._field("window")

    def lookup_group(self) -> int | None:
        """Return how many queries attend between two choices."""
        return self._field("group")

    def left(self, n: int) -> int:
        """Return how many tokens are left before a group of n, where room must be made."""
        return self._field("window") - n

    def staged(self, queries: Queries, view: KeptView) -> Stage:
        """Make room for a group where there is too little."""
        n = queries.stop - queries.first

        def worth(slots: Tensor) -> Tensor:
            at, pad = view.at.gather(2, slots), view.pad_column(slots.device)[..., 0]
            stays = (at >= self.latest_from(queries)) | (at < pad + self._field("sinks"))
            known = self.worth(slots, ~stays, view).masked_fill(stays, torch.inf)
            return known.masked_fill(at < pad, -torch.inf)

        return view.stage(queries, self._field("window"), self.left(n), worth)

    def latest_from(self, queries: Queries) -> int:
        """Return the index from which on tokens stay because they are the latest."""
        return queries.stop - self._field("recent")

    @abstractmethod
    def worth(self, slots: Tensor, can_go: Tensor, view: KeptView) -> Tensor:
        """Return what tokens are worth.

        Parameters
        ----------
        slots : Tensor
            Where they lie among those held and new, (batch, key-value heads, m).
        can_go : Tensor
            Boolean, the same shape: those that are neither sinks nor among the latest.
        view : KeptView
            Where they are.

        Returns
        -------
        Tensor
            float32, the same shape.
        """
