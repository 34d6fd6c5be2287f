"""Choosing the next token from the model's logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from everlong.errors import ConfigurationError, NumericalError

LONGEST_REPETITION_WINDOW = 4096
"""Tokens a session remembers for the repetition penalty."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; by default the likeliest (greedy).

    Applied in the order of transformers' ``generate()``: penalty, temperature, top-k, top-p, min-p.

    Parameters
    ----------
    temperature : float
        0: always the likeliest token. Otherwise logits are divided by it before a token is drawn.
    top_p : float
        Draw among the likeliest tokens that together have at least this probability; 1: off.
    top_k : int
        Draw among this many likeliest tokens; 0: off.
    min_p : float
        Draw among tokens at least this fraction as likely as the likeliest; 0: off.
    repetition_penalty : float
        Above 1, tokens that occurred lately become less likely (Keskar et al., arXiv 1909.05858).
    repetition_window : int
        How many tokens "lately" is, read and written; at most 4096.
    seed : int, optional
        Start the random draws anew from this seed; by default they go on from the session's.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window: int = 256
    seed: int | None = None

    def __post_init__(self) -> None:
        _require(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 (greedy) or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (off)")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 (off) and 1")
        _require(
            _whole(self.top_k) and self.top_k >= 0, "top_k", self.top_k, "a whole number, 0 (off) or more"
        )
        _require(
            0 < self.repetition_penalty < math.inf, "repetition_penalty", self.repetition_penalty, "above 0"
        )
        _require(
            _whole(self.repetition_window) and 1 <= self.repetition_window <= LONGEST_REPETITION_WINDOW,
            "repetition_window",
            self.repetition_window,
            f"a whole number from 1 to {LONGEST_REPETITION_WINDOW}",
        )
        _require(
            self.seed is None or (_whole(self.seed) and -(2**63) <= self.seed < 2**64),
            "seed",
            self.seed,
            "a whole number that fits in 64 bits, or None",
        )
        if self.temperature == 0 and (self.top_k, self.top_p, self.min_p) != (0, 1.0, 0.0):
            raise ConfigurationError(
                "top_p, top_k and min_p choose what to draw from, but temperature=0 draws nothing; "
                "set a temperature, for example 1.0, or leave them out"
            )


class Sampler:
    """Draws tokens as a :class:`Sampling` says.

    Parameters
    ----------
    sampling : Sampling
        How.
    generator : torch.Generator
        Where the random numbers come from, on the device of the logits; its state is the caller's.
    """

    def __init__(self, sampling: Sampling, generator: torch.Generator) -> None:
        self._generator = generator
        self._greedy = sampling.temperature == 0
        self._window = sampling.repetition_window
        self._penalty = None
        if sampling.repetition_penalty != 1:
            self._penalty = RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))
        self._warpers = LogitsProcessorList()
        if not self._greedy and sampling.temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(float(sampling.top_p)))
        if sampling.min_p:
            self._warpers.append(MinPLogitsWarper(float(sampling.min_p)))

    def __call__(self, logits: Tensor, recent: Sequence[int]) -> int:
        """Choose a token.

        Parameters
        ----------
        logits : Tensor (vocabulary,)
            Of the next token.
        recent : sequence of int
            The latest tokens, read and written.

        Raises
        ------
        NumericalError
            The logits are not finite.
        """
        if self._penalty is not None and recent:
            ids = torch.tensor([list(recent)[-self._window :]], device=logits.device)
            logits = self._penalty(ids, logits[None].clone())[0]
        largest, likeliest = logits.max(dim=-1)
        if not math.isfinite(largest.item()):
            raise NumericalError(
                "the model's logits are not finite; if it runs in float16, load it with dtype='bfloat16' or "
                "'float32', and otherwise check its weights"
            )
        if self._greedy:
            return int(likeliest)
        scores = self._warpers(None, logits[None].float())  # type: ignore[arg-type]
        return self._drawn(scores[0].softmax(-1))

    def _drawn(self, probs: Tensor) -> int:
        """Draw by a single random number; ``torch.multinomial`` makes one for each word of the vocabulary."""
        exact = torch.float32 if probs.device.type == "mps" else torch.float64
        total = probs.cumsum(-1, dtype=exact)
        at = torch.rand(1, generator=self._generator, dtype=exact, device=probs.device) * total[-1]
        return min(int(torch.searchsorted(total, at, right=True)), len(total) - 1)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(holds: bool, name: str, value: object, what: str) -> None:
    if not holds:
        raise ConfigurationError(f"{name}={value!r} cannot work: it must be {what}")


GREEDY = Sampling()
"""The likeliest token each time."""
