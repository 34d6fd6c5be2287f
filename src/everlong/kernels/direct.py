"""Kernels that are called as they are, and by no tape: what is asked of them is new each time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from everlong.kernels.calls import attends, fit, function, given_to, require
from everlong.kernels.loading import compiled
from everlong.kernels.team import asking_addresses, has_team, in_every_thread


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


def looks_at_codes(asked: Tensor, scales: Tensor, found: Tensor) -> bool:
    """Whether :func:`look_at_codes` takes tensors like these, and there are threads to run it in."""
    return fit(asked, scales, found) and asked.numel() > 0 and has_team()


def look_at_codes(
    asked: Tensor,
    segments: Sequence[Tensor],
    scales: Tensor,
    centers: Tensor,
    found: Tensor,
    *,
    segment: int,
    first: int,
    begin: int,
    stop: int,
    block: int,
) -> None:
    """Raise the maxima of blocks of tokens to the products of what asks with keys in bytes.

    Parameters
    ----------
    asked : Tensor
        Of each key-value head its own, shape (heads, c, d).
    segments : sequence of Tensor
        int8 codes of segments that follow one another, shape (heads, n, d) each. All but the first and the
        last have as many tokens, and those of one lie behind one another.
    scales, centers : Tensor
        What makes keys of codes, shape (segments, heads, d).
    found : Tensor
        The maxima, shape (heads, c, blocks), written to.
    segment : int
        Tokens of a segment; they begin at multiples of it.
    first : int
        The first token of the first segment.
    begin, stop : int
        The tokens of the blocks, which follow one another from `begin` on; others are not looked at.
    block : int
        Tokens of a block; the last may have fewer.
    """
    heads, c, d = asked.shape
    spread = (len(segments), heads, d)
    require(
        looks_at_codes(asked, scales, found)
        and fit(centers)
        and scales.shape == centers.shape == spread
        and found.shape == (heads, c, -(-(stop - begin) // block))
        and all(x.dtype == torch.int8 and x.stride()[1:] == (d, 1) for x in segments)
        and all(x.shape[::2] == (heads, d) for x in segments),
        "look_at_codes",
    )
    low, high = max(first, begin), min(first + sum(x.shape[1] for x in segments), stop)
    if low >= high:
        return
    threads, looked = torch.get_num_threads(), compiled().LOOKED
    scratch = asked.new_empty(threads * (4 * d + c * (d + 4 + looked)))
    lie = torch.tensor([(x.data_ptr(), x.stride(0)) for x in segments], device="cpu").T.contiguous()
    given = given_to(
        *(asked, lie[0], lie[1], scales, centers, found, scratch, *asking_addresses()),
        *(len(segments), heads, c, d, found.shape[2], block, segment, first, begin, low, high),
    )
    in_every_thread(compiled().look_at_codes.address)(given, threads)
