"""What a session reports: every result says what it cost and what was kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

StopReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Stats:
    """The accounts of a session.

    Attributes
    ----------
    tokens_read, tokens_written : int
        Tokens given to the model (turn markers included), and chosen by it.
    kept, recallable, forgotten : int
        Tokens in the window, in a tier below it, and lost to the model.
    waiting : int
        Tokens of the above that have not been run: the end of a text, which may still merge with what
        follows, and the last token written. All five add up: read + written = kept + recallable +
        forgotten + waiting.
    bytes : dict of str to int
        Bytes held, by tier.
    seconds : float
        Time spent in the model.
    tokens_per_second : float
        Tokens run in a second of it.
    perplexity : float or None
        Of everything run; None unless the session was made with ``surprisal=True``.
    """

    tokens_read: int
    tokens_written: int
    kept: int
    recallable: int
    forgotten: int
    waiting: int
    bytes: dict[str, int]
    seconds: float
    tokens_per_second: float
    perplexity: float | None


@dataclass(frozen=True)
class Progress:
    """How far a read has come.

    Attributes
    ----------
    tokens : int
        Tokens of this read that were run.
    total : int or None
        Tokens there will be, estimated from the length of the source; None where that is unknown.
    seconds, tokens_per_second : float
        Since this read began.
    perplexity : float or None
        Of this read so far.
    bytes : dict of str to int
        Bytes held, by tier.
    """

    tokens: int
    total: int | None
    seconds: float
    tokens_per_second: float
    perplexity: float | None
    bytes: dict[str, int]


@dataclass(frozen=True)
class Learned:
    """What a session learns in passing.

    Attributes
    ----------
    name : str
        Of the memory.
    segments, tokens : int
        Learned so far.
    waiting : int
        Tokens that have left the window and do not fill a segment yet, about.
    """

    name: str
    segments: int
    tokens: int
    waiting: int


@dataclass(frozen=True)
class ReadReport:
    """The outcome of a read.

    Attributes
    ----------
    tokens : int
        Tokens of the source, including those held back at its end, and the turn's opening if it was
        opened for it.
    seconds, tokens_per_second : float
        Of the whole read.
    perplexity : float or None
        Of the tokens run, to the power of their mean surprisal; None unless asked for.
    stats : Stats
        The session's accounts afterwards.
    learned : Learned or None
        Where the memory stands that the text goes into; None: it goes into none.
    """

    tokens: int
    seconds: float
    tokens_per_second: float
    perplexity: float | None
    stats: Stats
    learned: Learned | None = None


@dataclass(frozen=True, eq=False)
class Score:
    """How well a text was predicted.

    Attributes
    ----------
    tokens : int
        Tokens predicted.
    nll : float
        Mean surprisal in nats per token.
    perplexity : float
        Its exponential.
    surprisal : Tensor (tokens,), float32
        Of each token in nats.
    """

    tokens: int
    nll: float
    perplexity: float
    surprisal: Tensor


@dataclass(frozen=True)
class Generation:
    """What the model wrote; `str` gives the text.

    Attributes
    ----------
    text : str
        Without the stop string or the token that ended it.
    tokens : int
        Tokens written.
    seconds : float
        From the call to the last token.
    stop_reason : {"eos", "stop", "length"}
        The model ended its text; a stop string was met; `max_new_tokens` were written.
    stats : Stats
        The accounts afterwards: of the session, or of the fork on which a question was answered.
    memories : tuple of str
        Names of the memories that the model had while it wrote.
    """

    text: str
    tokens: int
    seconds: float
    stop_reason: StopReason
    stats: Stats
    memories: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.text


def perplexity(nll_sum: float, count: int) -> float | None:
    """Return the exponential of the mean over tokens; None if there are none."""
    if not count:
        return None
    try:
        return math.exp(nll_sum / count)
    except OverflowError:
        return math.inf
