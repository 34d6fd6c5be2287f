"""The keys of all tokens in a tier, in bytes and at hand, so that all of them can be looked at at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from everlong.attention.positions import working_dtype

SEGMENT = 1024
"""Tokens that have their scales in common."""

_FIRST_CAPACITY = 64  # tokens
_LEAST = torch.finfo(torch.float32).tiny


class KeyIndex:
    """The raw keys of one layer's tokens in a tier: as bytes in whole segments, the latest as they are.

    In bytes, a key is ``center + scale * code`` in each channel; center and scale are a segment's own. A byte
    for each channel is a quarter of what a tier in half precision holds. What is asked for is put into bytes
    for each segment, too, so that what is added up are whole numbers. Segments are shared between copies.

    Parameters
    ----------
    first : int
        The number of the first token that will come.
    is_exact : bool
        Whether all stay as they are.
    """

    def __init__(self, first: int = 0, *, is_exact: bool = False) -> None:
        self._is_exact = is_exact
        self._segments: list[Tensor] = []  # keys or codes, (batch, n, channels of all heads)
        self._scales: Tensor | None = None  # (batch, segments, channels)
        self._centers: Tensor | None = None
        self._begin = self._open_begin = self._next = first  # of the segments; of what is open; of what comes
        self._open: Tensor | None = None  # (batch, room, channels)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = copy.copy(self)
        twin._segments = list(self._segments)
        twin._open = None if self._open is None else self._open.clone()
        return twin

    # --- tokens come and go --------------------------------------------------------------------------

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

    def _held(self) -> Tensor:
        assert self._open is not None
        return self._open[:, : self._next - self._open_begin]

    def _close(self) -> None:
        keys = self._held()
        self._open_begin = self._next
        if self._is_exact:
            self._segments.append(keys.clone())
            return
        keys = keys.float()
        center = keys.mean(1, keepdim=True)
        keys = keys - center
        scale = (keys.abs().amax(1, keepdim=True) / 127).clamp(min=_LEAST)
        self._segments.append((keys / scale).round().to(torch.int8))
        self._scales = scale if self._scales is None else torch.cat((self._scales, scale), 1)
        self._centers = center if self._centers is None else torch.cat((self._centers, center), 1)

    def forget(self, first: int) -> None:
        """Let go of segments all of whose tokens come before `first`."""
        gone = 0
        while gone < len(self._segments) and self._begin + self._segments[gone].shape[1] <= first:
            self._begin += self._segments[gone].shape[1]
            gone += 1
        if gone:
            self._segments = self._segments[gone:]
            if self._scales is not None and self._centers is not None:
                self._scales, self._centers = self._scales[:, gone:], self._centers[:, gone:]

    def pick_rows(self, rows: Tensor) -> None:
        """Keep the given rows of the batch, in that order (repeats allowed)."""
        self._segments = [keys[rows.to(keys.device)] for keys in self._segments]
        for name in ("_scales", "_centers", "_open"):
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, held[rows.to(held.device)])

    # --- looking -------------------------------------------------------------------------------------

    def products(self, row: int, asked: Tensor, begin: int, stop: int) -> Tensor:
        """Return the products of each of `asked` with a row's keys of tokens [begin, stop).

        Parameters
        ----------
        row : int
            Which.
        asked : Tensor
            Shape (c, key-value heads, d).
        begin, stop : int
            Tokens that are here.

        Returns
        -------
        Tensor
            Shape (stop - begin, c), added up over heads.
        """
        assert self._open is not None
        asked = asked.to(self._open.device, working_dtype(self._open)).flatten(1).T
        found, first = [], self._begin
        wanted: list[int] = []
        for number, keys in enumerate(self._segments):
            if begin < first + keys.shape[1] and first < stop:
                wanted.append(number)
            first += keys.shape[1]
        at = self._begin + sum(keys.shape[1] for keys in self._segments[: wanted[0] if wanted else None])
        if wanted:
            found.append(self._of_segments(row, asked, wanted))
        if stop > self._open_begin:
            found.append(self._held()[row].to(asked.dtype) @ asked)
        every = found[0] if len(found) == 1 else torch.cat(found)
        return every[begin - at : stop - at]

    def _of_segments(self, row: int, asked: Tensor, numbers: list[int]) -> Tensor:
        """Return the products of keys of segments that follow one another with `asked`, (channels, c)."""
        if self._is_exact:
            return torch.cat([self._segments[number][row].to(asked.dtype) @ asked for number in numbers])
        assert self._scales is not None and self._centers is not None
        which = slice(numbers[0], numbers[-1] + 1)
        asked = asked.float()
        scaled = asked * self._scales[row, which, :, None]  # (segments, channels, c)
        steps = (scaled.abs().amax(1) / 127).clamp(min=_LEAST)
        codes = (scaled / steps[:, None]).round().to(torch.int8)
        shift = self._centers[row, which] @ asked
        segments = [self._segments[number][row] for number in numbers]
        found = asked.new_empty(sum(map(len, segments)), asked.shape[1])
        parts = torch.split(found, [len(segment) for segment in segments])
        for segment, code, step, more, part in zip(segments, codes, steps, shift, parts, strict=True):
            torch.addcmul(more, _whole_products(segment, code).float(), step, out=part)
        return found

    def keys_at(self, row: int, tokens: Tensor) -> Tensor:
        """Return single keys of a row: of what is in bytes, ``center + scale * code``.

        Parameters
        ----------
        row : int
            Which.
        tokens : Tensor
            That are here, shape (key-value heads, n), n above 0, each head its own.

        Returns
        -------
        Tensor
            Shape (key-value heads, n, d).
        """
        heads = torch.arange(len(tokens)).repeat_interleave(tokens.shape[1])
        wanted = tokens.flatten()
        segments = wanted // SEGMENT - self._begin // SEGMENT
        order = segments.argsort(stable=True)
        pieces: list[Tensor] = []
        begin = 0
        for number, count in enumerate(segments.bincount().tolist()):
            if count:
                here = order[begin : begin + count]
                pieces.append(self._single(row, number, heads[here], wanted[here], len(tokens)))
                begin += count
        return torch.cat(pieces)[order.argsort()].view(*tokens.shape, -1)

    def _single(self, row: int, number: int, heads: Tensor, tokens: Tensor, of: int) -> Tensor:
        """Return keys of one segment, or of what is open."""
        is_open = number == len(self._segments)
        first = self._open_begin if is_open else max(self._begin, (self._begin // SEGMENT + number) * SEGMENT)
        segment = self._held() if is_open else self._segments[number]
        keys: Tensor = segment[row].view(segment.shape[1], of, -1)[tokens - first, heads]
        keys = keys.to(working_dtype(self._held()))
        if is_open or self._is_exact:
            return keys
        assert self._scales is not None and self._centers is not None
        scale, center = (x[row, number].view(of, -1)[heads] for x in (self._scales, self._centers))
        return keys.mul_(scale).add_(center)

    def nbytes(self) -> int:
        """Bytes held."""
        rest = (self._scales, self._centers, self._open)
        return sum(x.nbytes for x in (*self._segments, *rest) if x is not None)


def keys_of_two(
    tokens: Tensor, count: int, early: Callable[[Tensor], Tensor], late: Callable[[], Tensor]
) -> Tensor:
    """Return single keys, some of which one finds and the others lie behind those.

    Parameters
    ----------
    tokens : Tensor
        Shape (key-value heads, n), each head its own, on the CPU.
    count : int
        Tokens that `early` knows: it returns keys, (key-value heads, n, d), of numbers below.
    early : callable
        Asked only where some are below.
    late : callable
        The same of the others: returns the keys of all tokens from `count` on, (key-value heads, m, d).

    Returns
    -------
    Tensor
        Shape (key-value heads, n, d), on the device of the later ones where any is of those.
    """
    is_early = tokens < count
    if bool(is_early.all()):
        return early(tokens)
    keys = late()
    at = (tokens - count).clamp(min=0).to(keys.device)
    found = keys.gather(1, at[..., None].expand(-1, -1, keys.shape[-1]))
    if not bool(is_early.any()):
        return found
    known = early(tokens.clamp(max=count - 1)).to(keys.device)
    return torch.where(is_early.to(keys.device)[..., None], known, found.to(known.dtype))


def _whole_products(codes: Tensor, asked: Tensor) -> Tensor:
    """Return the products of bytes (n, channels) and (channels, c), exact up to a thousand channels."""
    if codes.device.type == "cpu" and hasattr(torch, "_int_mm"):
        return torch._int_mm(codes, asked)
    return codes.float() @ asked.float()
