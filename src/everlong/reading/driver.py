"""Runs tokens through an attached model, chunk by chunk, and keeps what the next one needs."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from everlong.attention import Attachment, StreamCache
from everlong.attention.branches import Branches
from everlong.errors import NumericalError
from everlong.reading.sampling import LONGEST_REPETITION_WINDOW

_BLOCK = 2**22  # logits turned to surprisal at a time


class Driver:
    """One stream of tokens through one model.

    Parameters
    ----------
    attachment : Attachment
        The attached model.
    cache : StreamCache
        What it remembers of the stream.
    surprisal : bool
        Whether each token's surprisal is computed.
    """

    def __init__(self, attachment: Attachment, cache: StreamCache, surprisal: bool) -> None:
        self.attachment = attachment
        self.device = device_of(attachment)
        self.cache = cache
        self.surprisal = surprisal or cache.needs_surprisal
        self.logits: Tensor | None = None
        """Of the next token (vocabulary,), where they were computed after the last token run."""
        self.recent: deque[int] = deque(maxlen=LONGEST_REPETITION_WINDOW)
        """The last tokens run."""
        self.nll_sum = 0.0
        self.nll_count = 0
        self.seconds = 0.0
        self.tokens = 0

    def run(self, ids: Sequence[int], *, logits: bool, undisturbed: bool = False) -> Tensor | None:
        """Run one chunk.

        Parameters
        ----------
        ids : sequence of int
            At least one.
        logits : bool
            Whether the next token's logits are wanted; without them and surprisal, no head is computed.
        undisturbed : bool
            Whether nothing but Everlong's own code has run since the token before.

        Returns
        -------
        Tensor (len(ids),), float32, or None
            Each token's surprisal in nats, if computed; 0 for the first token of a stream.

        Raises
        ------
        NumericalError
            What the model computed is not finite.
        """
        with torch.inference_mode():
            started = time.perf_counter()
            model: Any = self.attachment.model
            given, call = self._call(ids, self.cache)
            found = None
            if len(ids) == 1 and (self.surprisal or logits):
                found = self.attachment.step(self.cache, given, undisturbed=undisturbed)[0]
            elif self.surprisal:
                found = model(**call).logits[0]
            elif logits:
                found = model(**call, logits_to_keep=1).logits[0]
            else:
                decoder: Any = self.attachment.decoder
                last = decoder(**call).last_hidden_state[0, -1]
                self._require_finite(float(last.float().abs().max()))
            surprisal = self.took(given[0], found, time.perf_counter() - started)
            self.cache.after_forward(given, None if surprisal is None else surprisal[None])
            return surprisal

    def took(self, ids: Tensor, logits: Tensor | None, seconds: float) -> Tensor | None:
        """Note what a forward made of this stream.

        Parameters
        ----------
        ids : Tensor (n,)
            The tokens that were run.
        logits : Tensor (n or 1, vocabulary) or None
            After each of them where surprisal is computed, otherwise after the last, if they were wanted.
        seconds : float
            This stream's share of the time.

        Returns
        -------
        Tensor (n,), float32, or None
            As of :meth:`run`.
        """
        started = time.perf_counter()
        surprisal = None
        if self.surprisal:
            assert logits is not None
            surprisal = self._surprisal(ids, logits)
        self.logits = None if logits is None else logits[-1].clone()  # not the whole chunk's
        self.recent.extend(ids.tolist())
        self.tokens += len(ids)
        self.seconds += seconds + time.perf_counter() - started
        return surprisal

    def _call(self, ids: Sequence[int], cache: Any) -> tuple[Tensor, dict[str, Any]]:
        """Return the ids as the model takes them, and the arguments of its forward."""
        given = torch.tensor([ids], device=self.device)
        return given, {"input_ids": given, self.attachment.cache_argument: cache, "use_cache": True}

    def run_tentatively(
        self,
        ids: Sequence[int],
        judge: Callable[[Tensor], Iterator[int]],
        branches: Branches | None = None,
    ) -> Tensor:
        """Run tokens of which only the first is certain.

        Parameters
        ----------
        ids : sequence of int
            At least one.
        judge : callable
            Given the logits after each token, shape (len(ids), vocabulary), it yields the numbers of those
            that stay, one after another. If it raises, those it has yielded do.
        branches : Branches, optional
            How they follow one another; otherwise each follows the one before.

        Returns
        -------
        Tensor (len(ids), vocabulary)
            The logits.
        """
        with torch.inference_mode():
            started = time.perf_counter()
            model: Any = self.attachment.model
            given, call = self._call(ids, self.cache)
            kept: list[int] = []
            try:
                with self.cache.provisional(branches):
                    logits: Tensor = model(**call).logits[0]
                for number in judge(logits):
                    kept.append(number)
                    self.logits = logits[number]
            finally:
                self.cache.commit(kept)
                self.recent.extend(ids[number] for number in kept)
                self.tokens += len(kept)
                self.seconds += time.perf_counter() - started
            assert self.logits is not None
            self.logits = self.logits.clone()  # not all of them
            self.cache.after_forward(given[:, kept], None)
            return logits

    def fork(self) -> Driver:
        """Return an independent copy."""
        copy = Driver(self.attachment, self.cache.fork(), self.surprisal)
        copy.logits = self.logits  # never written to
        copy.recent = self.recent.copy()
        copy.nll_sum, copy.nll_count = self.nll_sum, self.nll_count
        copy.seconds, copy.tokens = self.seconds, self.tokens
        return copy

    def _surprisal(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Surprisal (n,) of `ids` (n,) from the last logits and the chunk's own (n, vocabulary)."""
        surprisal = torch.zeros(len(ids), device=ids.device)
        if self.logits is not None:
            surprisal[:1] = _nll(self.logits[None], ids[:1])
        rows = max(1, _BLOCK // logits.shape[-1])
        for start in range(0, len(ids) - 1, rows):
            stop = min(start + rows, len(ids) - 1)
            surprisal[start + 1 : stop + 1] = _nll(logits[start:stop], ids[start + 1 : stop + 1])
        total = float(surprisal.double().sum())
        self._require_finite(total)
        self.nll_sum += total
        self.nll_count += len(ids) - (self.logits is None)
        return surprisal

    def _require_finite(self, value: float) -> None:
        if not math.isfinite(value):
            raise NumericalError(
                f"the model computed values that are not finite, at or before token {self.cache.seen}; if it "
                "runs in float16, load it with dtype='bfloat16' or 'float32', otherwise check its weights"
            )


def device_of(attachment: Attachment) -> torch.device:
    """Return where an attached model takes its token ids."""
    decoder: Any = attachment.decoder
    device: torch.device = decoder.get_input_embeddings().weight.device
    return device


def _nll(logits: Tensor, ids: Tensor) -> Tensor:
    logits = logits.float()
    return logits.logsumexp(-1) - logits.gather(-1, ids[:, None])[:, 0]
