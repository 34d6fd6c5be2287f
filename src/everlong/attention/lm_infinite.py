"""LM-Infinite: a Λ-shaped mask and a ceiling on distances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from everlong.attention.layer_memory import LayerMemory
from everlong.attention.parts import Part, Partial, merge_logits
from everlong.attention.policy import POLICIES, require_count
from everlong.attention.positions import working_dtype
from everlong.attention.view import LayerView, Queries
from everlong.attention.window import WindowPolicy
from everlong.errors import ConfigurationError

_BLOCK = 4096  # middle keys scored at a time


@POLICIES.register("lm-infinite")
@dataclass(frozen=True)
class LMInfinite(WindowPolicy):
    """LM-Infinite: Zero-Shot Extreme Length Generalization (Han et al., NAACL 2024, arXiv 2308.16137).

    What is kept: the first `sinks` tokens and the latest ``window - sinks``; with `top_k`, everything
    else in a tier below. What a query sees: those and, with `top_k`, the k middle keys with the largest
    logits, for each query and query head. At which positions: their true distance, or `ceiling` if that
    is less; middle keys at `top_k_distance`. What is forgotten: the middle, unless `top_k` is set.

    Parameters
    ----------
    sinks : int
        G, first tokens kept. 10 here; 5 to 100 are equally good in the paper, 0 is a catastrophe.
    window : int, optional
        W, all keys a query sees, itself and the sinks included; the model's training length by default.
    ceiling : int, "auto" or None
        A distance above it counts as it. "auto": ``window - 1``, so that inputs of up to W tokens give
        the stock model's result. None: no ceiling. The authors': ``LMInfinite(window=L+G, ceiling=L)``.
    top_k : int
        Middle keys each query sees per query head; 5 in the paper, 0 (off) here.
    top_k_layers : int
        First layer, counted from 0, that sees middle keys.
    top_k_distance : int, optional
        Where middle keys are placed; ``window // 2`` by default.
    """

    sinks: int = 10
    window: int | None = None
    ceiling: int | Literal["auto"] | None = "auto"
    top_k: int = 0
    top_k_layers: int = 4
    top_k_distance: int | None = None

    def __post_init__(self) -> None:
        require_count("LMInfinite", "sinks", self.sinks, least=0)
        require_count("LMInfinite", "window", self.window, least=1, optional=True)
        if self.ceiling != "auto":
            require_count("LMInfinite", "ceiling", self.ceiling, least=0, optional=True)
        for name in ("top_k", "top_k_layers"):
            require_count("LMInfinite", name, getattr(self, name), least=0)
        require_count("LMInfinite", "top_k_distance", self.top_k_distance, least=0, optional=True)
        if self.window is not None and self.window <= self.sinks:
            raise ConfigurationError(
                f"LMInfinite: a window of {self.window} cannot hold {self.sinks} sinks and a local token; "
                f"use window={self.sinks + 1} or more, or fewer sinks"
            )

    @property
    def forgets(self) -> bool:  # type: ignore[override]
        """Whether the middle is lost: unless `top_k` recalls from it."""
        return self.top_k == 0

    def resolve(self, training_length: int | None) -> Self:
        """Fill in the window, and from it the ceiling and the middle keys' distance."""
        resolved = super().resolve(training_length)
        assert resolved.window is not None
        return replace(
            resolved,
            ceiling=resolved.window - 1 if resolved.ceiling == "auto" else resolved.ceiling,
            top_k_distance=resolved.window // 2
            if resolved.top_k_distance is None
            else resolved.top_k_distance,
        )

    def shape(self) -> tuple[int, int | None]:
        """`sinks` sinks, the rest of the window local."""
        assert self.window is not None, "resolve() comes first"
        return self.sinks, self.window - self.sinks

    def near_until(self) -> int | None:
        """Return ceiling + 1, where the first token passes the ceiling."""
        return None if self.ceiling is None else self._ceiling + 1

    def far_from(self) -> int | None:
        """Return ceiling + G, where the last sink passes it."""
        return None if self.ceiling is None else self._ceiling + max(self.sinks, 1)

    def far_distances(self) -> Sequence[int]:
        """All sinks at the ceiling."""
        return [self._ceiling] * self.sinks

    def sink_is_far(self, row_index: Tensor, sink: Tensor) -> Tensor:
        """Whether the distance is above the ceiling."""
        return row_index - sink > self._ceiling

    def local_ceiling(self) -> int | None:
        """Return the ceiling, where it is inside the local part."""
        _, local = self.shape()
        assert local is not None
        return None if self.ceiling is None or self._ceiling >= local - 1 else self._ceiling

    @property
    def _ceiling(self) -> int:
        assert isinstance(self.ceiling, int), "resolve() comes first"
        return self.ceiling

    # --- middle tokens (section 3.3 of the paper) --------------------------------------------------

    def memory(self, layer: int, start: int) -> LayerMemory:
        """Return an empty memory for `layer`, with a tier where its queries see middle keys."""
        sinks, local = self.shape()
        keep_raw = self.local_ceiling() is not None
        return LayerMemory(sinks, local, keep_raw=keep_raw, keep_middle=self._sees_middle(layer), start=start)

    takes_branches: ClassVar[bool] = True
    in_place = WindowPolicy.in_place  # layers that see middle tokens have a memory that takes no shortest way

    def parts(self, queries: Queries, view: LayerView) -> list[Part | Partial]:
        """Show sinks, local tokens and, with `top_k`, the best of the middle."""
        parts = super().parts(queries, view)
        if self._sees_middle(view.call.layer):
            parts += self._middle(queries, view)
        return parts

    def _sees_middle(self, layer: int) -> bool:
        return self.top_k > 0 and layer >= self.top_k_layers

    def _middle(self, queries: Queries, view: LayerView) -> list[Partial]:
        """Attend to the k best middle keys of each query and head, all at `top_k_distance`."""
        sinks, local = self.shape()
        tier = view.memory.tier
        assert local is not None and tier is not None and self.top_k_distance is not None
        stop = queries.stop - local  # the last query sees the middle up to here
        if stop - sinks <= min(view.pads or (0,)):
            return []
        placed = queries.at(self.top_k_distance)
        batch, heads, n, size = placed.shape
        dtype, device, row_index = working_dtype(placed), placed.device, view.row_index(queries)
        best: tuple[Tensor, Tensor] | None = None
        for begin in range(sinks + tier.first, stop, _BLOCK):
            end = min(begin + _BLOCK, stop)
            keys, values = view.middle(begin, end)
            folded = placed.reshape(batch, keys.shape[1], -1, size).to(dtype)
            logits = folded @ view.rotation(keys, 0).to(dtype).transpose(-1, -2)
            logits = logits.reshape(batch, heads, n, -1) * view.call.scaling
            index = torch.arange(begin, end, device=device) - view.pad_column(device)  # in its row
            logits = logits.masked_fill((index < sinks) | (index > row_index - local), -torch.inf)
            best = _best_of(best, logits, values, self.top_k)
        if best is None:
            return []
        logits, seen = best
        if view.call.softcap is not None:
            capped = torch.tanh(logits / view.call.softcap) * view.call.softcap
            logits = capped.masked_fill(logits == -torch.inf, -torch.inf)
        return [merge_logits(logits, seen)]


def _best_of(
    before: tuple[Tensor, Tensor] | None, logits: Tensor, values: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Return the k largest logits of each query, those `before` included, and the values that go with them.

    Logits have the shape (batch, heads, n, m), values (batch, key-value heads, m, d); returned are
    (batch, heads, n, k) and (batch, heads, n, k, d).
    """
    batch, heads, _, count = logits.shape
    top, at = logits.topk(min(k, count), dim=-1)
    row = torch.arange(batch, device=values.device)[:, None, None, None]
    head = torch.arange(heads, device=values.device)[None, :, None, None] // (heads // values.shape[1])
    seen = values[row, head, at]
    if before is None:
        return top, seen
    top, seen = torch.cat((before[0], top), -1), torch.cat((before[1], seen), -2)
    top, order = top.topk(min(k, top.shape[-1]), dim=-1)
    return top, seen.gather(-2, order[..., None].expand(*order.shape, seen.shape[-1]))
