"""Keys and queries rotated to places that follow from where their tokens stand in their own row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from everlong.attention.view import LayerCall, LayerView, Queries

Place = Callable[[Tensor], Tensor]
"""Positions of tokens, by their index in their row."""


def row_indices(begin: int, tokens: int, pads: tuple[int, ...] | None) -> Tensor:
    """Return the index in its row of each of so many tokens, shape (rows, n), or (n,) where rows are alike.

    Padding counts as the row's first token: nobody sees it.
    """
    index = torch.arange(begin, begin + tokens)
    return (index - torch.tensor(pads)[:, None]).clamp(min=0) if pads and any(pads) else index


def placed_keys(keys: Tensor, begin: int, call: LayerCall, place: Place) -> Tensor:
    """Rotate raw keys (batch, heads, n, d) of the tokens from `begin` on; angles are shared by all layers."""
    rotation = call.rotation
    shared = "placed keys", id(rotation.frequencies), rotation.layout, keys.device, begin, keys.shape[2]
    if shared not in call.memo:
        call.memo[shared] = rotation.angles(place(row_indices(begin, keys.shape[2], call.pads)), keys)
    return rotation.turned(keys, call.memo[shared])


def placed_queries(queries: Queries, view: LayerView, place: Place) -> Tensor:
    """Rotate a group of queries."""
    rotation, raw = view.rotation, queries.raw
    ends = queries.first, queries.stop
    shared = "placed queries", id(rotation.frequencies), rotation.layout, raw.device, *ends
    if shared not in view.call.memo:
        index = row_indices(queries.first, raw.shape[2], view.pads)
        if view.branches is not None:
            index = row_indices(queries.first, 1, view.pads) + view.branches.depths
        view.call.memo[shared] = rotation.angles(place(index), raw)
    return rotation.turned(raw, view.call.memo[shared])
