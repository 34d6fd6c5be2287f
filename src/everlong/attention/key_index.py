"""The keys of all tokens in a tier, in bytes and at hand, so that all of them can be looked at at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Self

import torch
from torch import Tensor

from everlong.attention import compiled_keys
from everlong.attention.block_maxima import BlockMaxima
from everlong.attention.positions import working_dtype
from everlong.attention.slabs import Slabs
from everlong.kernels.direct import Segments, look
from everlong.kernels.tiles import codes_at, in_tiles, out_of_tiles

SEGMENT = 1024
"""Tokens that have their scales in common."""

_FIRST_CAPACITY = 64  # tokens
_LEAST = torch.finfo(torch.float32).tiny


class KeyIndex:
    """The raw keys of one layer's tokens in a tier: as bytes in whole segments, the latest as they are.

    In bytes, a key is ``center + scale * code`` in each channel; center and scale are a segment's own. A byte
    for each channel is a quarter of what a tier in half precision holds. What is asked for is put into whole
    numbers for each segment, too, of 16 bits, or without a compiled kernel of 8, so that what is added up are
    whole numbers. Segments are shared between copies.

    Parameters
    ----------
    first : int
        The number of the first token that will come.
    is_exact : bool
        Whether all stay as they are.
    begun : dict of str to Tensor, optional
        What :meth:`state` told of a segment that began before the first token.
    """

    def __init__(
        self, first: int = 0, *, is_exact: bool = False, begun: dict[str, Tensor] | None = None
    ) -> None:
        self._is_exact = is_exact
        self._begun = None if is_exact else begun
        self._in_tiles = False  # codes, where the kernel may look at them
        self._segments: list[Tensor] = []  # keys or codes, (batch, key-value heads, n, d), or tiles of these
        self._slabs = Slabs()
        self._rows: dict[int, Segments] = {}
        self._scales: Tensor | None = None  # (batch, segments, key-value heads, d)
        self._centers: Tensor | None = None
        self._begin = self._open_begin = self._next = first  # of the segments; of what is open; of what comes
        self._open: Tensor | None = None  # (batch, key-value heads, room, d)
        if self._begun and "keys" in self._begun:
            self._begin = self._open_begin = self._next = first - self._begun["keys"].shape[2]
            self._hold(self._begun["keys"])
            self._begun = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = copy.copy(self)
        twin._segments, twin._rows = list(self._segments), dict(self._rows)
        twin._slabs = Slabs()
        twin._open = None if self._open is None else self._open.clone()
        return twin

    # --- tokens come and go --------------------------------------------------------------------------

    def append(self, keys: Tensor) -> None:
        """Take in raw keys of the next tokens, shape (batch, key-value heads, n, d)."""
        keys = keys.detach()
        while keys.shape[2]:
            room = SEGMENT - self._next % SEGMENT
            self._hold(keys[:, :, :room])
            if self._next % SEGMENT == 0:
                self._close()
            keys = keys[:, :, room:]

    def _hold(self, keys: Tensor) -> None:
        at, count = self._next - self._open_begin, keys.shape[2]
        have = 0 if self._open is None else self._open.shape[2]
        if have < at + count:
            room = min(max(at + count, 2 * have, _FIRST_CAPACITY), SEGMENT)
            with torch.inference_mode(False):  # later forwards, in whatever mode, write into it
                grown = keys.new_empty(*keys.shape[:2], room, keys.shape[3])
            if self._open is not None:
                grown[:, :, :at] = self._open[:, :, :at]
            self._open = grown
        assert self._open is not None
        self._open[:, :, at : at + count] = keys
        self._next += count

    def _held(self) -> Tensor:
        assert self._open is not None
        return self._open[:, :, : self._next - self._open_begin]

    def _close(self) -> None:
        keys = self._held()
        self._open_begin, self._rows = self._next, {}
        if self._is_exact:
            self._segments.append(self._slabs.keep(keys))
            return
        if not self._segments:
            self._in_tiles = compiled_keys.may_take(keys)
        keys = keys.float()
        if self._begun is None:
            center = keys.mean(2, keepdim=True)
            scale = ((keys - center).abs().amax(2, keepdim=True) / 127).clamp(min=_LEAST)
        else:
            scale, center, self._begun = self._begun["scale"], self._begun["center"], None
        keys = keys - center
        codes = (keys / scale).round().to(torch.int8)
        if self._in_tiles:
            codes = in_tiles(codes, self._next - keys.shape[2])
        self._segments.append(self._slabs.keep(codes))
        scale, center = scale.transpose(1, 2), center.transpose(1, 2)
        self._scales = scale if self._scales is None else torch.cat((self._scales, scale), 1)
        self._centers = center if self._centers is None else torch.cat((self._centers, center), 1)

    def forget(self, first: int) -> None:
        """Let go of segments all of whose tokens come before `first`."""
        gone = min(first, self._open_begin) // SEGMENT - self._begin // SEGMENT
        if gone > 0:
            self._begin = self._tokens_of(gone - 1)[1]
            self._segments, self._rows = self._segments[gone:], {}
            if self._scales is not None and self._centers is not None:
                self._scales, self._centers = self._scales[:, gone:], self._centers[:, gone:]

    def _tokens_of(self, number: int) -> tuple[int, int]:
        """Return which tokens a segment is of: from one to before another."""
        first = (self._begin // SEGMENT + number) * SEGMENT
        return max(self._begin, first), first + SEGMENT

    def pick_rows(self, rows: Tensor) -> None:
        """Keep the given rows of the batch, in that order (repeats allowed)."""
        self._segments = [self._slabs.keep(keys[rows.to(keys.device)]) for keys in self._segments]
        self._rows = {}
        for name in ("_scales", "_centers", "_open"):
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, held[rows.to(held.device)])
        if self._begun is not None:
            self._begun = {name: held[rows.to(held.device)] for name, held in self._begun.items()}

    # --- looking -------------------------------------------------------------------------------------

    def look(self, row: int, best: BlockMaxima) -> None:
        """Look at those of a row's keys that are here, for blocks of tokens that all are."""
        count = min(best.stop, self._open_begin) - max(best.begin, self._begin)
        if count > 0 and not self._look_at_once(row, best, count):
            self._look_by_segment(row, best)
        if best.stop > self._open_begin:
            best.look(self._open_begin, self._held()[row])

    def _look_at_once(self, row: int, best: BlockMaxima, count: int) -> bool:
        """Look at `count` tokens of segments by a compiled kernel; return whether there is one for them."""
        segments = self._of_row(row) if compiled_keys.may_pay(best.asked, count) else None
        if segments is None or not compiled_keys.pays(best.asked, segments, best.found):
            return False
        both = self._scales, self._centers
        spread = None if both[0] is None or both[1] is None else (both[0][row], both[1][row])
        look(best.asked, segments, spread, best.found, **best.blocks())
        return True

    def _of_row(self, row: int) -> Segments:
        """Return a row's segments, found once as long as they are the same."""
        if row not in self._rows:
            keys, stop = [segment[row] for segment in self._segments], self._open_begin
            self._rows[row] = Segments(keys, first=self._begin, stop=stop, segment=SEGMENT)
        return self._rows[row]

    def _look_by_segment(self, row: int, best: BlockMaxima) -> None:
        """Look at segments one after another, as PyTorch multiplies them."""
        low, high = max(best.begin, self._begin), min(best.stop, self._open_begin)
        wanted = range(
            low // SEGMENT - self._begin // SEGMENT, (high - 1) // SEGMENT - self._begin // SEGMENT + 1
        )
        if not self._is_exact:
            self._look_at_codes(row, wanted, best)
            return
        for number in wanted:
            best.look(self._tokens_of(number)[0], self._segments[number][row])

    def _look_at_codes(self, row: int, wanted: range, best: BlockMaxima) -> None:
        """Look at segments that follow one another."""
        assert self._scales is not None and self._centers is not None
        asked, which = best.asked.to(self._scales), slice(wanted.start, wanted.stop)
        scaled = asked * self._scales[row, which, :, None]  # (segments, key-value heads, c, d)
        steps = (scaled.abs().amax(3, keepdim=True) / 127).clamp(min=_LEAST)
        codes = scaled.div_(steps).round_().to(torch.int8)
        shifts = asked @ self._centers[row, which, ..., None]  # (segments, key-value heads, c, 1)
        for number, code, step, shift in zip(wanted, codes, steps, shifts, strict=True):
            (first, stop), keys = self._tokens_of(number), self._segments[number][row]
            if self._in_tiles:
                keys = out_of_tiles(keys, first, stop - first, asked.shape[2])
            best.take(first, _whole_products(code, keys), partial(_scaled, step, shift))

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
                pieces.append(self._single(row, number, heads[here], wanted[here]))
                begin += count
        return torch.cat(pieces)[order.argsort()].view(*tokens.shape, -1)

    def _single(self, row: int, number: int, heads: Tensor, tokens: Tensor) -> Tensor:
        """Return keys of one segment, or of what is open."""
        is_open, first = number == len(self._segments), self._tokens_of(number)[0]
        segment, d = self._held() if is_open else self._segments[number], self._held().shape[3]
        if self._in_tiles and not is_open:
            keys = codes_at(segment[row], first, heads, tokens, d)
        else:
            keys = segment[row][heads, tokens - first]
        keys = keys.to(working_dtype(self._held()))
        if is_open or self._is_exact:
            return keys
        assert self._scales is not None and self._centers is not None
        scale, center = (x[row, number][heads] for x in (self._scales, self._centers))
        return keys.mul_(scale).add_(center)

    def state(self, first: int) -> dict[str, Tensor]:
        """Return what the tokens before `first`, which are given up, left in the segment that `first` is in.

        Of one in bytes its scale and center, shape (batch, key-value heads, 1, d); of one that is not whole
        its keys. Others are found again from the tokens that are still there.
        """
        if self._is_exact or first % SEGMENT == 0:
            return {}
        if self._begun is not None:
            return self._begun
        if self._segments and self._scales is not None and self._centers is not None:
            found = {"scale": self._scales, "center": self._centers}
            return {name: x[:, :1].transpose(1, 2).contiguous() for name, x in found.items()}
        return {"keys": self._held()[:, :, : first - self._open_begin].clone()}

    @staticmethod
    def bytes_of(tokens: int, keys: Tensor) -> int:
        """Return about the bytes of so many tokens whose keys are like these, not kept exact."""
        channels, whole = keys.shape[:2].numel() * keys.shape[3], tokens - tokens % SEGMENT
        scales = 8 * (whole // SEGMENT)
        return channels * (whole + scales + (tokens - whole) * keys.element_size())

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


def _scaled(step: Tensor, shift: Tensor, products: Tensor) -> Tensor:
    """Return what products of whole numbers stand for."""
    return torch.addcmul(shift, products.float(), step)


def _whole_products(asked: Tensor, codes: Tensor) -> Tensor:
    """Return the products of bytes (heads, c, d) and (heads, n, d), exact up to a thousand channels.

    Few rows with many keys each are quicker than many keys with few columns, and than single precision.
    """
    if codes.device.type != "cpu" or not _bytes_are_multiplied_exactly():
        return asked.float() @ codes.float().mT
    found = codes.new_empty(*asked.shape[:2], codes.shape[1], dtype=torch.int32)
    for some, keys, part in zip(asked, codes, found, strict=True):
        torch._int_mm(some, keys.T, out=part)
    return found


@cache
def _bytes_are_multiplied_exactly() -> bool:
    """Whether this CPU's kernel adds products of bytes up as whole numbers: without VNNI they are clipped."""
    if not hasattr(torch, "_int_mm"):
        return False
    most = torch.full((16, 64), 127, dtype=torch.int8)
    return all(bool((torch._int_mm(most, sign * most.T) == sign * 64 * 127**2).all()) for sign in (1, -1))
