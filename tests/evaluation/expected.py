"""What measurements must come to, computed the slow way; and a clock that only moves when it is told to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from everlong.attention import LMInfinite
from everlong.attention.cache import StreamCache

HEADS, HEAD_SIZE = 2, 8
"""Key-value heads of the tiny models, and their size."""
A_KEY = HEADS * HEAD_SIZE * 4
"""Bytes of one token's keys, or values, in one layer, in float32."""


@torch.no_grad()
def stock_logits(model: Any, ids: Tensor) -> Tensor:
    """Logits of the model as it is, of shape (n, vocabulary), from one forward that keeps nothing."""
    logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits


def surprisal_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Surprisal of each of `ids`, shape (n,), in nats; NaN for the first."""
    logs = logits.double().log_softmax(-1)
    return torch.tensor([math.nan, *(-float(logs[i - 1, ids[i]]) for i in range(1, len(ids)))])


def perplexity_of(surprisal: Sequence[float]) -> float:
    """Perplexity of the tokens that have a surprisal."""
    scored = [float(value) for value in surprisal if not math.isnan(value)]
    return math.exp(math.fsum(scored) / len(scored))


def greedy(model: Any, ids: Tensor, steps: int) -> list[int]:
    """Return the next `steps` tokens, each the likeliest after all before it, read anew every time."""
    tokens = ids.tolist()
    for _ in range(steps):
        tokens.append(int(stock_logits(model, torch.tensor(tokens))[-1].argmax()))
    return tokens[len(ids) :]


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        """Return the time, in seconds."""
        return self.now


@dataclass(frozen=True)
class Listening(LMInfinite):
    """LM-Infinite that writes down what it is told; it has no registered name."""

    heard: list[Any] = field(default_factory=list, compare=False)

    def after_forward(self, cache: StreamCache, tokens: Tensor, surprisal: Tensor | None) -> None:
        """Write down the tokens and their surprisal."""
        self.heard.append((tokens.clone(), None if surprisal is None else surprisal.clone()))

    def end_of_prefill(self, cache: StreamCache) -> None:
        """Write down that writing begins."""
        self.heard.append("writing")
