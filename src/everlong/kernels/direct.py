"""Kernels that are called as they are, and by no tape: what is asked of them is new each time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from everlong.kernels.calls import attends, fit, function, given_to, require
from everlong.kernels.loading import compiled
from everlong.kernels.team import asking_addresses, has_team, in_every_thread
from everlong.kernels.tiles import MOST_CHANNELS, PAIRS, TILE


def is_believed(gives_the_same: Callable[[], bool], what_they_do: str, module: str = "compiled") -> bool:
    """Whether there are kernels, compiled now if they were not, that give what plain operations give here.

    Parameters
    ----------
    gives_the_same : callable
        Holds them against plain operations.
    what_they_do : str
        For a warning where they differ.
    module : str
        Which has them, see :func:`~everlong.kernels.loading.compiled`.
    """
    if compiled(module) is None or not has_team():
        return False
    with torch.autocast("cpu", enabled=False):  # whoever asks first
        is_right = gives_the_same()
    if not is_right:
        warnings.warn(
            f"compiled kernels {what_they_do} wrongly on this machine: PyTorch's are taken", stacklevel=3
        )
    return is_right


def attends_parts(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> bool:
    """Whether :func:`attend_parts` takes queries, keys and values like these."""
    query, keys = parts[0][:2]
    return all(
        attends(*part) and part[0].shape == query.shape and part[1].shape[:2] == keys.shape[:2]
        for part in parts
    )


def attend_parts(parts: Sequence[tuple[Tensor, Tensor, Tensor]], scaling: float) -> Tensor:
    """Attend to several parts under one softmax, as :func:`~everlong.kernels.calls.attend` does to one.

    Parameters
    ----------
    parts : sequence of tuple of Tensor
        Queries, keys and values of each part, all with as many rows, heads and dimensions.
    scaling : float
        Factor on the products.

    Returns
    -------
    Tensor
        Shape (rows, heads, 1, d).
    """
    require(attends_parts(parts), "attend_parts")
    query, first = parts[0][:2]
    (rows, kv_heads, _, d), threads, run = first.shape, torch.get_num_threads(), compiled().RUN
    groups, g = rows * kv_heads, query.shape[1] // kv_heads
    runs = sum(-(-keys.shape[2] // run) for _, keys, _ in parts)
    sums, logits = query.new_empty(groups * runs * g * (d + 2)), query.new_empty(threads * g * run)
    counts = torch.tensor([keys.shape[2] for _, keys, _ in parts], device="cpu")
    at, out = counts.data_ptr(), torch.empty_like(query)
    each = [
        (*part, at + number * counts.element_size(), part[1].stride(1)) for number, part in enumerate(parts)
    ]
    given = given_to(
        *each[0],
        *(out, sums, logits, *asking_addresses(), groups, g, d, float(scaling), len(parts) - 1),
        *(value for part in each[1:] for value in part),
    )
    in_every_thread(compiled().attend_runs.address)(given, threads)
    function("merge_runs")(given)
    return out


class Segments:
    """The keys of tokens that follow one another, float32 or int8 codes in tiles, where a kernel finds them.

    Parameters
    ----------
    keys : sequence of Tensor
        Of each segment, keys, (heads, n, d), or codes as :func:`~everlong.kernels.tiles.in_tiles` lays them.
        What is of one head lies together, heads may lie apart.
    first : int
        The first token of the first segment.
    stop : int
        The token behind the last.
    segment : int
        Tokens of a segment; all but the first begin at a multiple of it. Of codes a multiple of a tile's.
    """

    def __init__(self, keys: Sequence[Tensor], *, first: int, stop: int, segment: int) -> None:
        self.first, self.stop, self.segment = first, stop, segment
        self.like, self.are_codes = keys[0], keys[0].dtype == torch.int8
        self._keys = tuple(keys)

    def __len__(self) -> int:
        return len(self._keys)

    @cached_property
    def lie(self) -> Tensor:
        """Where they lie, and the stride of their heads: int64, shape (2, segments)."""
        both = [x.data_ptr() for x in self._keys], [x.stride(0) for x in self._keys]
        return torch.tensor(both, device="cpu")

    def are_of(self, heads: int, d: int) -> bool:
        """Whether they are of so many heads and channels, lie as a kernel reads them, and are all there."""
        of_one = (-(-d // 2), TILE, 2) if self.are_codes else (d,)
        return self._shape == (heads, *of_one)

    @cached_property
    def _shape(self) -> tuple[int, ...] | None:
        """The shape of each, but for its second number; None: not all of them are as a kernel expects."""
        size = TILE if self.are_codes else 1
        begins = [
            self.first,
            *range(self.first - self.first % self.segment + self.segment, self.stop, self.segment),
        ]
        ends = [*begins[1:], self.stop]
        counts = [-(-stop // size) - begin // size for begin, stop in zip(begins, ends, strict=True)]
        kind = self.like.shape[0], *self.like.shape[2:]
        fit = (
            self.like.dtype in (torch.float32, torch.int8)
            and self.segment % size == 0
            and [x.shape[1] for x in self._keys] == counts
            and all(
                x[0].is_contiguous()
                and (x.dtype, x.device.type) == (self.like.dtype, "cpu")
                and (x.shape[0], *x.shape[2:]) == kind
                for x in self._keys
            )
        )
        return kind if fit else None


def looks(asked: Tensor, segments: Segments, found: Tensor) -> bool:
    """Whether :func:`look` takes what asks, keys and maxima like these."""
    heads, _, d = asked.shape
    is_of = segments.are_of(heads, d) and asked.numel() > 0 and (d <= MOST_CHANNELS or not segments.are_codes)
    return is_of and fit(asked, found) and has_team()


def look(
    asked: Tensor,
    segments: Segments,
    spread: tuple[Tensor, Tensor] | None,
    found: Tensor,
    *,
    begin: int,
    stop: int,
    block: int,
) -> None:
    """Raise the maxima of blocks of tokens to the products of what asks with their keys.

    Parameters
    ----------
    asked : Tensor
        Of each key-value head its own, shape (heads, c, d).
    segments : Segments
        The keys.
    spread : tuple of Tensor or None
        Of codes, scale and center of each segment, (segments, heads, d): a key is center + scale * code.
    found : Tensor
        The maxima, shape (heads, c, blocks), written to.
    begin, stop : int
        The tokens of the blocks, which follow one another from `begin` on; others are not looked at.
    block : int
        Tokens of a block; the last may have fewer.
    """
    heads, c, d = asked.shape
    require(
        looks(asked, segments, found)
        and segments.are_codes == (spread is not None)
        and (spread is None or fit(*spread))
        and all(x.shape == (len(segments), heads, d) for x in spread or ())
        and found.shape == (heads, c, -(-(stop - begin) // block)),
        "look",
    )
    low, high = max(segments.first, begin), min(segments.stop, stop)
    if low >= high:
        return
    threads = torch.get_num_threads()
    scratch = asked.new_empty(threads * compiled().room(c, d))
    given = given_to(
        *(asked, *segments.lie, *(spread or (0, 0)), found, scratch, *asking_addresses()),
        *(len(segments), heads, c, d, found.shape[2], block, segments.segment),
        *(segments.first, begin, low, high),
    )
    in_every_thread(compiled().look.address)(given, threads)


def turns(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether :func:`turn` takes these: float32 on the CPU, the numbers of a token's head in one piece."""
    return (
        all((y.dtype, y.device.type, y.stride(-1)) == (torch.float32, "cpu", 1) for y in (x, cos, sin))
        and cos.shape == sin.shape
        and (cos.dim() == 2 or cos.shape[:2] == (x.shape[0], 1))
        and cos.shape[-2] in (1, x.shape[2])
        and cos.shape[-1] <= x.shape[3]
        and cos.shape[-1] % (2 * PAIRS) == 0
        and x.numel() > 0
        and has_team()
    )


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate many tokens, as :func:`~everlong.models.rotary.rotate` does pairs in halves; shapes as there."""
    require(turns(x, cos, sin), "turn")
    rows, heads, n, d = x.shape
    out, threads = x.new_empty(x.shape), torch.get_num_threads()
    angles = [y.expand(rows, 1, n, y.shape[-1]) for y in (cos, sin)]
    strides = [y.stride(i) for y in angles for i in (0, 2)]
    given = given_to(
        *(x, cos, sin, out, *asking_addresses(), rows, heads, n, d, cos.shape[-1]),
        *(*x.stride()[:3], *strides),
    )
    in_every_thread(compiled("turning").turn.address)(given, threads)
    return out
