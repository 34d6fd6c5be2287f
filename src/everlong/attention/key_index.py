"""The keys of all tokens in a tier, in bytes and at hand, so that all of them can be looked at at once."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from everlong.attention.positions import working_dtype

SEGMENT = 4096
"""Tokens that have their scales in common."""

_FIRST_CAPACITY = 64  # tokens
_LEAST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class PlainKeys:
    """Keys of some consecutive tokens as they are.

    Attributes
    ----------
    keys : Tensor
        Shape (batch, n, channels), the channels of all key-value heads side by side.
    """

    keys: Tensor

    def __len__(self) -> int:
        return self.keys.shape[1]

    def products(self, row: int, asked: Tensor) -> Tensor:
        """Return the products of a vector (channels,) with the keys of a row, shape (n,)."""
        dtype = working_dtype(self.keys)
        return self.keys[row].to(dtype) @ asked.to(self.keys.device, dtype)

    def pick_rows(self, rows: Tensor) -> PlainKeys:
        """Return the given rows."""
        return PlainKeys(self.keys[rows.to(self.keys.device)])

    def nbytes(self) -> int:
        """Bytes held."""
        return self.keys.nbytes


@dataclass(frozen=True, eq=False)
class CodedKeys:
    """Keys of some consecutive tokens, each number a byte: ``key = center + scale * code``.

    Attributes
    ----------
    codes : Tensor
        int8, shape (batch, n, channels), the channels of all key-value heads side by side.
    scale, center : Tensor
        float32, shape (batch, channels).
    """

    codes: Tensor
    scale: Tensor
    center: Tensor

    @classmethod
    def of(cls, keys: Tensor) -> Self:
        """Put keys (batch, n, channels) into bytes."""
        keys = keys.float()
        center = keys.mean(1)
        keys = keys - center[:, None]
        scale = (keys.abs().amax(1) / 127).clamp(min=_LEAST)
        return cls((keys / scale[:, None]).round().to(torch.int8), scale, center)

    def __len__(self) -> int:
        return self.codes.shape[1]

    def products(self, row: int, asked: Tensor) -> Tensor:
        """Return the products of a vector (channels,) with the keys of a row, shape (n,).

        The vector is put into bytes, too, so that what is added up are whole numbers.
        """
        asked = asked.to(self.codes.device, torch.float32)
        scaled = asked * self.scale[row]
        step = (scaled.abs().amax() / 127).clamp(min=_LEAST)
        whole = _whole_products(self.codes[row], (scaled / step).round().to(torch.int8))
        return whole * step + asked @ self.center[row]

    def pick_rows(self, rows: Tensor) -> CodedKeys:
        """Return the given rows."""
        return CodedKeys(*(x[rows.to(x.device)] for x in (self.codes, self.scale, self.center)))

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.nbytes for x in (self.codes, self.scale, self.center))


class KeyIndex:
    """The raw keys of one layer's tokens in a tier: as bytes in whole segments, the latest as they are.

    A byte for each channel is a quarter of what a tier in half precision holds. Segments are shared between
    copies.

    Parameters
    ----------
    first : int
        The number of the first token that will come.
    is_exact : bool
        Whether all stay as they are.
    """

    def __init__(self, first: int = 0, *, is_exact: bool = False) -> None:
        self._is_exact = is_exact
        self._segments: list[PlainKeys | CodedKeys] = []
        self._begin = self._open_begin = self._next = first  # of the segments; of what is open; of what comes
        self._open: Tensor | None = None  # (batch, room, channels)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = copy.copy(self)
        twin._segments = list(self._segments)
        twin._open = None if self._open is None else self._open.clone()
        return twin

    def append(self, keys: Tensor) -> None:
        """Take in raw keys of the next tokens, shape (batch, key-value heads, n, d)."""
        keys = keys.detach().transpose(1, 2).flatten(2)
        while keys.shape[1]:
            room = SEGMENT - self._next % SEGMENT
            self._hold(keys[:, :room])
            if self._next % SEGMENT == 0:
                self._close()
            keys = keys[:, room:]

    def _hold(self, keys: Tensor) -> None:
        at = self._next - self._open_begin
        have = 0 if self._open is None else self._open.shape[1]
        if have < at + keys.shape[1]:
            room = min(max(at + keys.shape[1], 2 * have, _FIRST_CAPACITY), SEGMENT)
            with torch.inference_mode(False):  # later forwards, in whatever mode, write into it
                grown = keys.new_empty(len(keys), room, keys.shape[2])
            if self._open is not None:
                grown[:, :at] = self._open[:, :at]
            self._open = grown
        assert self._open is not None
        self._open[:, at : at + keys.shape[1]] = keys
        self._next += keys.shape[1]

    def _close(self) -> None:
        held = self._held()
        self._segments.append(PlainKeys(held.clone()) if self._is_exact else CodedKeys.of(held))
        self._open_begin = self._next

    def _held(self) -> Tensor:
        assert self._open is not None
        return self._open[:, : self._next - self._open_begin]

    def products(self, row: int, asked: Tensor, begin: int, stop: int) -> Tensor:
        """Return the products of `asked` with the keys of a row's tokens [begin, stop), added up over heads.

        Parameters
        ----------
        row : int
            Which.
        asked : Tensor
            Shape (key-value heads, d).
        begin, stop : int
            Tokens that are here.
        """
        found, first = [], self._begin
        for some in (*self._segments, PlainKeys(self._held())):
            last = first + len(some)
            if first < stop and begin < last:
                found.append(some.products(row, asked.flatten())[max(begin - first, 0) : stop - first])
            first = last
        return found[0] if len(found) == 1 else torch.cat(found)

    def pick_rows(self, rows: Tensor) -> None:
        """Keep the given rows of the batch, in that order (repeats allowed)."""
        self._segments = [some.pick_rows(rows) for some in self._segments]
        if self._open is not None:
            self._open = self._open[rows.to(self._open.device)]

    def forget(self, first: int) -> None:
        """Let go of segments all of whose tokens come before `first`."""
        while self._segments and self._begin + len(self._segments[0]) <= first:
            self._begin += len(self._segments.pop(0))

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(some.nbytes() for some in self._segments) + (
            0 if self._open is None else self._open.nbytes
        )


def _whole_products(codes: Tensor, asked: Tensor) -> Tensor:
    """Return the products of bytes (n, channels) and (channels,), exact up to a thousand channels."""
    if codes.device.type == "cpu" and hasattr(torch, "_int_mm"):
        return torch._int_mm(codes, asked[:, None])[:, 0].float()
    return codes.float() @ asked.float()
