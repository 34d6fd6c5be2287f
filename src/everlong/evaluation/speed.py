"""Speed at a depth: one chunk of prefill and the decode steps, from a cache that is filled first."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from everlong.errors import ConfigurationError, UnsupportedUseError
from everlong.evaluation.streams import PolicyStream, StockStream, Stream

BLOCK = 32
"""Steps in which every method has done all that it does now and then: each 2nd, 4th, up to each 32nd."""


def fill(stream: Stream, depth: int, *, chunk: int = 512, seed: int = 0) -> None:
    """Bring an empty stream to `depth` tokens, as far as its cost is concerned.

    A stock cache is given random keys and values directly. A policy's window is filled by reading random
    tokens; one that forgets holds no more at `depth` than once its window is full, and reads no further.

    Parameters
    ----------
    stream : Stream
        Empty.
    depth : int
        Tokens.
    chunk : int
        Tokens per forward where they are read.
    seed : int
        Of the random tokens, keys and values.
    """
    if depth < 1:
        raise ConfigurationError(f"a stream is filled with at least 1 token, not {depth}")
    generator = torch.Generator().manual_seed(seed)
    if isinstance(stream, StockStream):
        _fill_stock(stream, depth, generator)
        return
    assert isinstance(stream, PolicyStream)
    if stream.settles_at is not None:
        depth = min(depth, stream.settles_at + chunk)
    read_random(stream, depth, chunk=chunk, generator=generator)


def read_random(
    stream: Stream, tokens: int, *, chunk: int = 512, generator: torch.Generator | None = None
) -> None:
    """Read `tokens` random tokens, `chunk` at a time."""
    ids = random_ids(stream.decoder, tokens, generator)
    for begin in range(0, tokens, chunk):
        stream.read(ids[begin : begin + chunk])


def prefill_seconds(stream: Stream, ids: Tensor) -> float:
    """Return the seconds one chunk, shape (n,), takes."""
    started = time.perf_counter()
    wait_for(stream.read(ids))
    return time.perf_counter() - started


def decode_seconds(stream: Stream, ids: Tensor, head: nn.Module | None = None) -> list[float]:
    """Return the seconds of each step when `ids`, shape (n,), come one by one, as ``generate`` writes.

    Parameters
    ----------
    stream : Stream
        Where they go on from.
    ids : Tensor
        The tokens; that they are not the model's own choice costs nothing and changes nothing.
    head : nn.Module, optional
        The model's output embeddings, to be counted too, as writing needs them.
    """
    steps = []
    with torch.inference_mode():
        for number, token in enumerate(ids):
            started = time.perf_counter()
            hidden = stream.read(token[None], undisturbed=number > 0)
            wait_for(hidden if head is None else head(hidden))
            steps.append(time.perf_counter() - started)
    return steps


def step_seconds(steps: Sequence[float]) -> float:
    """Return the seconds of a step, of those that methods take now and then too.

    A method that looks something up every few tokens is dear in these alone: a median would leave them out.
    The mean counts them. Of many steps it is the median of the means of blocks, whole cycles of such lookups,
    so that a machine that was busy for a moment does not count.

    Parameters
    ----------
    steps : sequence of float
        Seconds of each, in the order they were taken; at least one.
    """
    if len(steps) < 2 * BLOCK:
        return fmean(steps)
    return median(fmean(steps[at : at + BLOCK]) for at in range(0, len(steps) - BLOCK + 1, BLOCK))


class Bookmark:
    """A place in a stock stream that it can be taken back to, the local layers too, which cannot be cropped.

    Parameters
    ----------
    stream : StockStream
        Where it is now.
    """

    def __init__(self, stream: StockStream) -> None:
        layers: list[Any] = [stream.cache.layers[number] for number in stream.layers]
        self._stream, self._seen = stream, stream.seen
        self._local = {layer: dict(layer.__dict__) for layer in layers if layer.is_sliding}
        self._full = [layer for layer in layers if not layer.is_sliding]

    def go_back(self) -> None:
        """Take the stream back."""
        more = self._stream.seen - self._seen
        for layer in self._full:
            layer.crop(-more)
        for layer, before in self._local.items():  # their tensors are replaced, never written into
            layer.__dict__.update(before)


def rewind(stream: Stream, depth: int) -> None:
    """Take a stock stream back to `depth` tokens. A policy's window stays as full as it is."""
    if isinstance(stream, StockStream):
        if True in stream.cache.is_sliding:
            raise UnsupportedUseError(
                "the stock cache of a model with local layers cannot be taken back: measure with repeats=1"
            )
        stream.cache.crop(depth - stream.seen)


def random_ids(decoder: nn.Module, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Return `count` random token ids of the model's vocabulary, shape (count,), on its device."""
    embedding: nn.Embedding = decoder.get_input_embeddings()  # type: ignore[operator]
    ids = torch.randint(len(embedding.weight), (count,), generator=generator)
    return ids.to(embedding.weight.device)


def rates(
    streams: Sequence[Stream],
    *,
    chunk: int,
    steps: int,
    repeats: int,
    heads: Sequence[nn.Module] | None = None,
    seed: int = 1,
) -> list[dict[str, float]]:
    """Measure filled streams in turn, several times over, and return each one's medians.

    Parameters
    ----------
    streams : sequence of Stream
        Each attached to a model of its own, or stock.
    chunk, steps : int
        Tokens of the prefill chunk, and decode steps, per repeat.
    repeats : int
        Interleaved, so that a change in the machine's load meets all streams alike.
    heads : sequence of nn.Module, optional
        Each stream's output embeddings, counted in the decode steps; without them, they are not.

    Returns
    -------
    list of dict
        ``prefill_tokens_per_second`` and ``decode_ms`` per stream: medians of the repeats, of each of which
        ``decode_ms`` is :func:`step_seconds` of its steps. In tables made before 2026-11-29, as those in
        ``benchmarks/results``, it is the median of the steps, which leaves lookups out.
    """
    if repeats < 1 or steps < 1 or chunk < 1:
        raise ConfigurationError(
            f"repeats, steps and chunk must be at least 1, not {repeats}, {steps}, {chunk}"
        )
    generator = torch.Generator().manual_seed(seed)
    prefill: list[list[float]] = [[] for _ in streams]
    decode: list[list[float]] = [[] for _ in streams]
    depths = [stream.seen for stream in streams]
    for _ in range(repeats):
        for number, stream in enumerate(streams):
            ids = random_ids(stream.decoder, chunk + steps, generator)
            prefill[number].append(prefill_seconds(stream, ids[:chunk]))
            head = None if heads is None else heads[number]
            decode[number].append(step_seconds(decode_seconds(stream, ids[chunk:], head)))
            if repeats > 1:
                rewind(stream, depths[number])
    return [
        {"prefill_tokens_per_second": chunk / median(p), "decode_ms": 1000 * median(d)}
        for p, d in zip(prefill, decode, strict=True)
    ]


def _fill_stock(stream: StockStream, depth: int, generator: torch.Generator) -> None:
    stream.read(random_ids(stream.decoder, 1, generator))  # shows each layer's shape
    for index, (keys, values) in stream.layers.items():
        more = [
            torch.randn((*like.shape[:2], depth - 1, like.shape[3]), generator=generator).to(like)
            for like in (keys, values)
        ]
        stream.cache.update(more[0], more[1], index)


def wait_for(tensor: Tensor) -> None:
    """Wait until `tensor` is computed, on devices that compute behind one's back."""
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
    elif tensor.device.type == "mps":
        torch.mps.synchronize()
