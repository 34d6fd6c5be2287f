"""What reading a text will cost, from a few chunks: tokens, seconds, bytes."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from statistics import linear_regression, mean
from typing import Any

from everlong.attention import Attachment
from everlong.errors import ConfigurationError, InputError
from everlong.evaluation.speed import prefill_seconds, random_ids
from everlong.evaluation.streams import StockStream
from everlong.models.loading import LoadedModel
from everlong.reading.driver import Driver
from everlong.reading.source import Source, open_source
from everlong.reading.tokens import TextCoder, TokenStream

_FEWEST, _MOST = 2, 4  # chunks measured, after one that warms up


@dataclass(frozen=True)
class Estimate:
    """What reading will cost.

    Attributes
    ----------
    tokens : int
        To be read.
    seconds : float
        Of the whole read.
    last_tokens_per_second : float
        Its rate at the end.
    bytes : dict of str to int
        Held at the end, by tier.
    """

    tokens: int
    seconds: float
    last_tokens_per_second: float
    bytes: dict[str, int]


def count_tokens(tokenizer: Any, source: Source) -> int:
    """Count the tokens of a source, which is never held as a whole.

    Raises
    ------
    InputError
        The source is empty, binary, or cannot be opened.
    """
    stream = TokenStream(TextCoder(tokenizer))
    count = 0
    with closing(open_source(source, len(tokenizer))) as pieces:
        for piece in pieces:
            count += len(stream.feed(piece) if isinstance(piece, str) else piece)
    return count + len(stream.finish())


def estimate(attachment: Attachment, tokens: int, *, chunk: int = 512, surprisal: bool = False) -> Estimate:
    """Estimate the cost of reading `tokens` tokens, by reading a few chunks of random ones.

    A chunk's time is taken to grow linearly with the keys it sees, until the window is full.

    Parameters
    ----------
    attachment : Attachment
        The attached model; the stream read here is thrown away.
    tokens : int
        At least 1.
    chunk : int
        Tokens run at a time.
    surprisal : bool
        Whether each token's surprisal is to be computed too.
    """
    if tokens < 1:
        raise InputError(f"there is nothing to estimate for {tokens} tokens")
    if chunk < 1:
        raise ConfigurationError(f"chunk must be at least 1, not {chunk}")
    chunk = min(chunk, tokens)
    driver = Driver(attachment, attachment.new_cache(), surprisal)
    policy = driver.cache.policy
    is_bounded = policy.forgets or policy.lookup_group() is not None
    span = policy.span if is_bounded else None
    before, seconds = [], []
    for _ in range(min(_MOST, max(_FEWEST, -(-tokens // chunk))) + 1):
        ids = random_ids(attachment.decoder, chunk).tolist()
        before.append(_keys(driver.cache.seen, span))
        started = time.perf_counter()
        driver.run(ids, logits=False)
        seconds.append(time.perf_counter() - started)
    slope, base = _line(before[1:], seconds[1:])
    costs = [base + slope * _keys(seen, span) for seen in range(0, tokens, chunk)]
    total = sum(costs) - costs[-1] * (-tokens % chunk) / chunk  # the last chunk may be shorter
    return Estimate(tokens, total, chunk / costs[-1], driver.cache.bytes_at(tokens))


def reading_rate(loaded: LoadedModel, *, chunk: int = 512) -> float:
    """Return how many tokens a second the model as it is reads, from a chunk of random ones.

    Parameters
    ----------
    loaded : LoadedModel
        The model, detached.
    chunk : int
        Tokens of the chunk; another one before it warms up.
    """
    stream = StockStream(loaded.model)
    ids = random_ids(stream.decoder, chunk)
    prefill_seconds(stream, ids)
    return chunk / prefill_seconds(stream, ids)


def _keys(seen: int, span: int | None) -> int:
    return seen if span is None else min(seen, span)


def _line(x: list[int], y: list[float]) -> tuple[float, float]:
    """Return slope and intercept of the line through the points; flat where it would fall."""
    if len(set(x)) > 1:
        slope, intercept = linear_regression(x, y)
        if slope > 0 and intercept > 0:
            return slope, intercept
    return 0.0, mean(y)
