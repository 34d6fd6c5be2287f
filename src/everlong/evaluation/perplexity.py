"""Perplexity by position: how well each token of a long text is predicted, and what reading it cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from everlong.errors import InputError, NumericalError
from everlong.evaluation.statistics import stream_interval
from everlong.evaluation.streams import Stream
from everlong.models.head import Head
from everlong.reading.reports import Progress


@dataclass(frozen=True)
class Chunk:
    """What one chunk of a reading cost.

    Attributes
    ----------
    stop : int
        Tokens read at its end.
    tokens : int
        Its length.
    seconds : float
        In the decoder; scoring is not counted.
    bytes : int
        Held by the cache at its end, all tiers together.
    """

    stop: int
    tokens: int
    seconds: float
    bytes: int


@dataclass(frozen=True, eq=False)
class Reading:
    """A text that was read and scored.

    Attributes
    ----------
    surprisal : Tensor
        Of each token in nats, float32, shape (n,); NaN for a first one that nothing predicts.
    chunks : tuple of Chunk
        In the order they were read.
    last_hidden : Tensor
        The hidden state after the last token, shape (1, d), from which one can go on.
    """

    surprisal: Tensor
    chunks: tuple[Chunk, ...]
    last_hidden: Tensor

    @property
    def seconds(self) -> float:
        """Spent in the decoder."""
        return sum(chunk.seconds for chunk in self.chunks)


@dataclass(frozen=True)
class Bucket:
    """Perplexity of the tokens at positions [start, stop).

    Attributes
    ----------
    start, stop : int
        Positions in the text.
    tokens : int
        Tokens scored there.
    perplexity : float
        The exponential of their mean surprisal.
    low, high : float
        Its 95 % interval.
    """

    start: int
    stop: int
    tokens: int
    perplexity: float
    low: float
    high: float


def read_stream(
    stream: Stream,
    head: Head,
    ids: Tensor,
    *,
    chunk: int = 512,
    after: Tensor | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Reading:
    """Read `ids` chunk by chunk and score every token that is predicted.

    Parameters
    ----------
    stream : Stream
        Empty, or one to go on with.
    head : Head
        The same model's head.
    ids : Tensor
        Shape (n,), n at least 1.
    chunk : int
        Tokens of one forward.
    after : Tensor, optional
        The hidden state that predicts the first token, shape (1, d): the :class:`Reading`'s before this one.
        Without it the first token is not scored.
    progress : callable, optional
        Told after each chunk.

    Raises
    ------
    NumericalError
        A surprisal is not finite.
    """
    if ids.ndim != 1 or not len(ids):
        raise InputError(
            f"a stream reads one row of at least one id, not a tensor of shape {tuple(ids.shape)}"
        )
    ids = ids.to(head.weight.device)
    surprisal = torch.full((len(ids),), torch.nan)
    chunks: list[Chunk] = []
    carried = after  # the hidden state that predicts the next chunk's first token
    total = 0.0
    for begin in range(0, len(ids), chunk):
        piece = ids[begin : begin + chunk]
        started = time.perf_counter()
        hidden = stream.read(piece)
        _synchronise(hidden)
        seconds = time.perf_counter() - started
        before = hidden[:-1] if carried is None else torch.cat((carried, hidden[:-1]))
        scored = head.surprisal(before, piece[len(piece) - len(before) :])
        stop = begin + len(piece)
        surprisal[stop - len(before) : stop] = scored.cpu()
        total += float(scored.double().sum())
        if not math.isfinite(total):
            raise NumericalError(
                f"a surprisal between tokens {begin} and {stop} is not finite; "
                "if the model runs in float16, load it with dtype='bfloat16' or 'float32'"
            )
        stream.told(piece, torch.nan_to_num(surprisal[begin:stop]).to(piece.device))
        carried = hidden[-1:].clone()
        held = stream.bytes()
        chunks.append(Chunk(stop, len(piece), seconds, sum(held.values())))
        if progress is not None:
            spent = sum(each.seconds for each in chunks)
            mean = total / max(1, stop - (after is None))
            progress(
                Progress(stop, len(ids), spent, stop / max(spent, 1e-9), math.exp(min(mean, 700.0)), held)
            )
    assert carried is not None
    return Reading(surprisal, tuple(chunks), carried)


def read_on(stream: Stream, head: Head, ids: Tensor, after: Tensor | None) -> Tensor:
    """Read tokens in one forward, and tell their surprisal where the method goes by it.

    Parameters
    ----------
    stream : Stream
        What reads.
    head : Head
        The same model's head.
    ids : Tensor
        Shape (n,), n at least 1.
    after : Tensor or None
        The hidden state that predicts the first token, shape (1, d); None: nothing does.

    Returns
    -------
    Tensor
        The hidden state after the last token, shape (1, d).
    """
    hidden = stream.read(ids)
    if stream.wants_surprisal:
        before = hidden[:-1] if after is None else torch.cat((after, hidden[:-1]))
        surprisal = torch.zeros(len(ids), device=hidden.device)
        unknown = len(ids) - len(before)
        if len(before):
            surprisal[unknown:] = head.surprisal(before, ids[unknown:].to(hidden.device))
        stream.told(ids, surprisal)
    return hidden[-1:]


def write_on(stream: Stream, ids: Tensor, logits: Tensor) -> Tensor:
    """Read a token that was just written; its surprisal is told from the logits that it was chosen by.

    Parameters
    ----------
    stream : Stream
        What reads.
    ids : Tensor
        Shape (1,).
    logits : Tensor
        Of that token, shape (1, vocabulary).

    Returns
    -------
    Tensor
        The hidden state after it, shape (1, d).
    """
    hidden = stream.read(ids)
    if stream.wants_surprisal:
        stream.told(ids, logits.logsumexp(-1) - logits[:, int(ids)])
    return hidden[-1:]


def bucketed(surprisal: Tensor, width: int, *, start: int = 0) -> list[Bucket]:
    """Return perplexity by position, in buckets of `width` tokens.

    Parameters
    ----------
    surprisal : Tensor
        In nats, shape (n,); NaN where a token was not scored.
    width : int
        Positions per bucket; the last may be shorter.
    start : int
        Position of the first token.
    """
    found = []
    for begin in range(0, len(surprisal), width):
        piece = surprisal[begin : begin + width].double()
        scored = piece[~piece.isnan()].tolist()
        if not scored:
            continue
        nll = stream_interval(scored)
        found.append(
            Bucket(
                start + begin,
                start + begin + len(piece),
                len(scored),
                _exp(nll.mean),
                _exp(nll.low),
                _exp(nll.high),
            )
        )
    return found


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _synchronise(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
