"""A token that comes alone while what was recalled stands: its attention, by compiled kernels."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from everlong.kernels.calls import fit, function, given_to, require, token_fits, window_fits
from everlong.kernels.loading import compiled
from everlong.kernels.team import asking_addresses, in_every_thread

_FIRST_PART, _PART = 15, 5  # of what attend_runs is given: where its second part begins, and numbers of one


class Shown(NamedTuple):
    """What a layer's tokens see while what was recalled stands.

    Attributes
    ----------
    heads : int
        Of a query.
    keys, values, raw : Tensor
        The window, full, and its keys unrotated; shape (rows, key-value heads, slots, d), heads may lie
        apart, all alike.
    stood_keys, stood_values : Tensor
        What stands, seen from a second place; shape (rows, key-value heads, m, d), as the window lies.
    latest : int
        Tokens of the window that are seen, the new one included.
    scaling : float
        Factor on the products.
    """

    heads: int
    keys: Tensor
    values: Tensor
    raw: Tensor
    stood_keys: Tensor
    stood_values: Tensor
    latest: int
    scaling: float

    @property
    def fits(self) -> bool:
        """Whether kernels take tensors that lie like these."""
        rows, kv_heads, _, d = self.keys.shape
        return (
            window_fits(self.keys, self.values)
            and window_fits(self.raw, self.keys)
            and window_fits(self.stood_keys, self.stood_values)
            and (*self.stood_keys.shape[:2], self.stood_keys.shape[3]) == (rows, kv_heads, d)
            and self.heads % kv_heads == 0
        )


class Standing:
    """One layer's attention to what it is shown, one token a row: where that lies is noted once, and held."""

    def __init__(self, shown: Shown) -> None:
        require(shown.fits, "attend_runs")
        self._shown, self._threads = shown, torch.get_num_threads()
        heads, keys, values, raw, *_, latest, scaling = shown
        stood = shown.stood_keys, shown.stood_values
        rows, kv_heads, _, d = keys.shape
        groups, g, run = rows * kv_heads, heads // kv_heads, compiled().RUN
        runs = -(-stood[0].shape[2] // run) + -(-latest // run) + 1  # the latest lie in two pieces, at times
        turned = rows * heads * d
        self._places = 0, turned, 2 * turned, 2 * turned + groups * runs * g * (d + 2)
        self._numbers = self._places[-1] + self._threads * g * run
        self._slot_and_counts = (ctypes.c_int64 * 4)(0, stood[0].shape[2], 0, 0)
        slot, *counts = (ctypes.addressof(self._slot_and_counts) + 8 * number for number in range(4))
        self._turning = given_to(
            *(0, 0, 0, 0, 0, slot, keys, values, 0, raw, 0, 0, 0, 0, keys.stride(1)),
            *(rows, heads, kv_heads, d, 0, 0, 0, 0, 0),
        )
        self._attending = given_to(
            *(0, *stood, counts[0], stood[0].stride(1), 0, 0, 0, *asking_addresses()),
            *(groups, g, d, float(scaling), 2),
            *(0 for count in counts[1:] for _ in range(_PART)),
        )
        for number, count in enumerate(counts[1:]):
            at = _FIRST_PART + _PART * number
            self._attending[at + 3 : at + 5] = [count, keys.stride(1)]

    def is_of(self, shown: Shown) -> bool:
        """Whether it was made of this, for as many threads as there are."""
        return self._threads == torch.get_num_threads() and all(
            one is other or (not isinstance(one, Tensor) and one == other)
            for one, other in zip(self._shown, shown, strict=True)
        )

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        here: tuple[Tensor, Tensor],
        far: tuple[Tensor, Tensor],
        slot: int,
        runs: list[slice],
    ) -> Tensor:
        """Put a token a row into the window, and attend.

        Parameters
        ----------
        query, key, value : Tensor
            Unrotated, shape (rows, heads, 1, d) and (rows, key-value heads, 1, d); rows may lie apart.
        here, far : tuple of Tensor
            Cos and sin, shape (1, r), for pairs in halves: of the token's place, and of where it sees from
            what stands.
        slot : int
            Of the window, for the token.
        runs : list of slice
            In which slots the latest tokens are then, this one included: one run of them, or two.

        Returns
        -------
        Tensor
            Shape (rows, heads, 1, d).
        """
        keys, values = self._shown.keys, self._shown.values
        width, d = here[0].shape[-1], keys.shape[3]
        require(
            token_fits(query, key, value, keys)
            and fit(*here, *far)
            and all(x.shape == (1, width) for x in (*here, *far))
            and width <= d
            and 0 <= slot < keys.shape[2]
            and 0 < len(runs) <= 2
            and all(0 <= run.start < run.stop <= keys.shape[2] for run in runs)
            and sum(run.stop - run.start for run in runs) == self._shown.latest,
            "attend_runs",
        )
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        between = query.new_empty(self._numbers)
        turned, far_turned, sums, logits = (between.data_ptr() + 4 * place for place in self._places)
        turning, attending, numbers = self._turning, self._attending, self._slot_and_counts
        turning[:5] = [x.data_ptr() for x in (query, key, value, *here)]
        turning[10:14] = [turned, *(x.stride(0) for x in (query, key, value))]
        turning[19], turning[21:24] = width, [*(x.data_ptr() for x in far), far_turned]
        attending[0], attending[5:8] = far_turned, [out.data_ptr(), sums, logits]
        numbers[0], numbers[3] = slot, 0
        for number, run in enumerate(runs):
            at = _FIRST_PART + _PART * number
            attending[at : at + 3] = [turned, *(x.data_ptr() + 4 * d * run.start for x in (keys, values))]
            numbers[2 + number] = run.stop - run.start
        function("turn_and_put")(turning)
        in_every_thread(compiled().attend_runs.address)(attending, self._threads)
        function("merge_runs")(attending)
        return out
