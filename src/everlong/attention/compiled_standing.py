"""Attention by compiled kernels of a token that comes alone while what was recalled stands, as in writing."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from everlong.kernels.calls import fit, token_fits
from everlong.kernels.direct import is_believed
from everlong.kernels.loading import is_recorded, wanted
from everlong.kernels.standing import Shown, Standing
from everlong.models.rotary import rotate

_LEAST = 2**17  # numbers in all keys: what is smaller does without a compiler

Pair = tuple[Tensor, Tensor]


def standing_call(
    known: Standing | None, shown: Shown, query: Tensor, key: Tensor, value: Tensor
) -> Standing | None:
    """Return what attends by kernels, if there are some that take this and pay.

    Parameters
    ----------
    known : Standing or None
        What did so for this layer before.
    shown : Shown
        What the token sees.
    query, key, value : Tensor
        Unrotated, one token a row.
    """
    if is_recorded() or not token_fits(query, key, value, shown.keys):
        return None
    if known is not None and known.is_of(shown):
        return known
    numbers = key.numel() * (shown.latest + shown.stood_keys.shape[2])
    if numbers < _LEAST or not wanted() or not shown.fits:
        return None
    return Standing(shown) if _is_right() else None


def turns(layout: str, d: int, *angles: Pair | None) -> bool:
    """Whether kernels rotate a token's heads, of d numbers each, to all of these places."""
    tables = [table for both in angles for table in both or (None,)]
    return layout == "halves" and all(
        table is not None
        and fit(table)
        and tables[0] is not None
        and table.shape == (1, tables[0].shape[-1])
        and table.shape[-1] <= d
        for table in tables
    )


@functools.cache
def _is_right() -> bool:
    return is_believed(_gives_the_same, "attend")


def _gives_the_same() -> bool:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")

    window = drawn(2, 2, 300, 20), drawn(2, 2, 300, 20), drawn(2, 2, 300, 20)
    stands = drawn(2, 2, 70, 20), drawn(2, 2, 70, 20)
    here, far = (drawn(1, 12), drawn(1, 12)), (drawn(1, 12), drawn(1, 12))
    call, ours = Standing(Shown(6, *window, *stands, 200, 0.25)), [x.clone() for x in window]
    for slot, runs in ((10, [slice(250, 300), slice(0, 150)]), (90, [slice(100, 300)])):
        query, key, value = drawn(2, 6, 1, 20), drawn(2, 2, 1, 20), drawn(2, 2, 1, 20)
        found = call.attend(query, key, value, here, far, slot, runs)
        ours[0][:, :, slot : slot + 1], ours[1][:, :, slot : slot + 1] = rotate(key, *here, "halves"), value
        ours[2][:, :, slot : slot + 1] = key
        seen = [torch.cat([x[:, :, run] for run in runs], 2) for x in ours[:2]]
        logits = [
            rotate(query, *angles, "halves").view(2, 2, 3, 20) @ keys.mT / 4
            for angles, keys in ((far, stands[0]), (here, seen[0]))
        ]
        expected = torch.cat(logits, -1).softmax(-1) @ torch.cat((stands[1], seen[1]), 2)
        alike = [(found, expected.view(2, 6, 1, 20)), *zip(window, ours, strict=True)]
        if not all(torch.allclose(one, other, atol=1e-5, rtol=1e-4) for one, other in alike):
            return False
    return True
