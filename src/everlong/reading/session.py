"""A session: one stream of text, read and written without end."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from everlong.attention import Policy, StreamCache
from everlong.errors import ConfigurationError, InputError, StateError, UnsupportedUseError
from everlong.reading import state
from everlong.reading.attached import AttachedModel
from everlong.reading.detokenize import checked_stop
from everlong.reading.driver import Driver
from everlong.reading.interrupt import deferred_interrupt
from everlong.reading.reports import Generation, Progress, ReadReport, Score, Stats
from everlong.reading.sampling import Sampling
from everlong.reading.source import Source, TokenPieces, open_source
from everlong.reading.tokens import TokenStream
from everlong.reading.writing import write

_GREEDY = Sampling()


class Session:
    """One stream of text through one model. Made by ``llm.session()``; use it in one thread at a time.

    What is read is tokenised as the whole text would be: the end of it, which may still merge with what
    follows, waits (`stats.waiting`) until more comes or the model is to write. Where the model has a chat
    template, text is read inside a user turn, which a question closes.

    Parameters
    ----------
    model : AttachedModel
        The model.
    policy : Policy, optional
        This stream's own instead of the attached model's.
    system : str, optional
        Text that the conversation begins with.
    chunk : int
        Tokens run at a time while reading.
    surprisal : bool
        Whether to compute each token's surprisal, for perplexity; it costs the model's head.
    seed : int, optional
        Of the random draws. With a seed a fork draws what its original would; without, something new.
    """

    def __init__(
        self,
        model: AttachedModel,
        *,
        policy: Policy | None = None,
        system: str | None = None,
        chunk: int = 512,
        surprisal: bool = False,
        seed: int | None = None,
    ) -> None:
        if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1:
            raise ConfigurationError(f"chunk={chunk!r} cannot work: it must be a whole number of at least 1")
        if system is not None and not system:
            raise InputError("the system text is empty: give one, or none at all")
        Sampling(seed=seed)  # checks it
        self._model = model
        self._policy = policy
        self._chunk = chunk
        self._seed = seed
        self._form = model.form(with_system=system is not None)
        self._system = system
        self._generator = torch.Generator(device=model.device)
        self._begin(surprisal)

    def _begin(self, surprisal: bool) -> None:
        model = self._model
        model.require_attached()
        self._driver = Driver(model.attachment, model.attachment.new_cache(self._policy), surprisal)
        self._asked_surprisal = surprisal
        self._stream = TokenStream(model.coder)
        self._queue: list[int] = []  # tokens accepted and not yet run
        self._place = "start"  # then "raw" (outside turns), "user" or "assistant" (inside theirs)
        self._taken = 0  # tokens read, without the held tail
        self._written = 0
        if self._seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(self._seed)

    # --- reading -----------------------------------------------------------------------------------

    def read(self, source: Source, *, progress: Callable[[Progress], None] | None = None) -> ReadReport:
        """Read a text of any length into the stream. Ctrl-C keeps what was taken from the source.

        Parameters
        ----------
        source : str, Path, open file, iterable of str, or ids
            See :func:`everlong.reading.source.open_source`; it is never held as a whole. Token ids are read
            as they are: without a start token, and outside a turn if none is open.
        progress : callable, optional
            Called after each chunk.

        Raises
        ------
        InputError
            What cannot be read, or nothing at all. What was taken before the bad place stays read.
        """
        model = self._model
        model.require_attached()
        opened = open_source(source, model.vocabulary)
        before, started = _Account(self), time.perf_counter()

        def reported(total: int | None) -> Progress:
            tokens = self._driver.tokens - before.run if total is None else total
            if total is None and opened.fraction:
                total = max(tokens, round((self.tokens_read - before.read) / opened.fraction))
            seconds = time.perf_counter() - started
            perplexity = before.perplexity(self._driver)
            return Progress(tokens, total, seconds, tokens / seconds, perplexity, self._driver.cache.bytes())

        with closing(iter(opened)) if isinstance(opened, TokenPieces) else closing(opened):  # type: ignore[type-var]
            for number, piece in enumerate(opened):
                with deferred_interrupt():
                    if number == 0:
                        self._open(as_ids=isinstance(piece, list))
                    self._accept(self._stream.feed(piece) if isinstance(piece, str) else piece)
                while len(self._queue) > self._chunk:
                    self._run_chunk(logits=False)
                    if progress is not None:
                        progress(reported(None))
        with deferred_interrupt():
            self._accept(self._stream.settle())
        self._run_all(logits=not self._stream.tail)
        tokens, seconds = self.tokens_read - before.read, time.perf_counter() - started
        if progress is not None:
            progress(reported(tokens))
        return ReadReport(tokens, seconds, tokens / seconds, before.perplexity(self._driver), self.stats)

    def pin(self, text: str) -> ReadReport:
        """Read a text that is never forgotten: its tokens, and the turn's opening, become sinks.

        Parameters
        ----------
        text : str
            Instructions, usually; a blank line is added where it does not end with a line.

        Raises
        ------
        StateError
            Something was read before.
        ConfigurationError
            The text does not leave room in the window.
        """
        self._model.require_attached()
        if self._place != "start":
            raise StateError("pin() comes before everything else: call reset() first, or begin a new session")
        if not text:
            raise InputError("the text to pin is empty")
        trial = self.fork()
        trial._open()
        trial._accept(trial._stream.feed(text if text.endswith("\n") else text + "\n\n") + trial._stream.finish())
        policy = _with_sinks(self._driver.cache.policy, len(trial._queue))
        started, before = time.perf_counter(), _Account(self)
        if policy is not None:
            self._driver.cache = self._model.attachment.new_cache(policy)
        self._stream, self._queue, self._place = trial._stream, trial._queue, trial._place
        self._taken = trial._taken
        self._run_all(logits=True)
        tokens, seconds = self.tokens_read, time.perf_counter() - started
        return ReadReport(tokens, seconds, tokens / seconds, before.perplexity(self._driver), self.stats)

    def score(self, text: str) -> Score:
        """Tell how well the model predicts that the stream goes on with `text`; the session stays as it is.

        Parameters
        ----------
        text : str
            Tokenised by itself, after everything read.
        """
        self._model.require_attached()
        if not text:
            raise InputError("the text to score is empty")
        fork = self.fork()
        fork._open(as_text=fork._system is not None)
        fork._accept(fork._stream.finish())
        fork._run_all(logits=True)
        fork._driver.surprisal = True
        coder = self._model.coder
        ids = coder.encode(text) if fork._stream.fresh else coder.encode_after(text)
        known = fork._driver.logits is not None
        parts = [fork._driver.run(ids[i : i + self._chunk], logits=True) for i in range(0, len(ids), self._chunk)]
        surprisal = torch.cat([part for part in parts if part is not None])[0 if known else 1 :].cpu()
        if not len(surprisal):
            raise InputError("nothing was read and the text is a single token: there is nothing to predict it from")
        nll = float(surprisal.double().mean())
        return Score(len(surprisal), nll, _exp(nll), surprisal)

    # --- writing -----------------------------------------------------------------------------------

    def stream(
        self, max_new_tokens: int = 256, *, sampling: Sampling = _GREEDY, stop: str | Sequence[str] = ()
    ) -> Generator[str, None, Generation]:
        """Go on writing, and yield the text as it comes: whole characters, never a part of a stop string.

        Parameters
        ----------
        max_new_tokens : int
            Tokens to write at most.
        sampling : Sampling
            How each is chosen; the likeliest by default.
        stop : str or sequence of str
            Texts at which to stop; they are not given out.

        Returns
        -------
        generator
            Of text; its return value is the :class:`Generation`.

        Raises
        ------
        InputError
            Nothing was read, and the model has no start token to begin from.
        NumericalError
            The logits are not finite.
        """
        if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
            raise ConfigurationError(f"max_new_tokens={max_new_tokens!r} cannot work: it must be at least 1")
        stop = checked_stop(stop)
        self._model.require_attached()
        started = time.perf_counter()
        if self._place == "start":
            if self._system is None and not self._model.coder.bos:
                raise InputError("the prompt has zero tokens and the model no start token: read() something first")
            self._open(as_text=self._system is not None)
        return write(self, max_new_tokens, sampling, stop, started)

    def generate(
        self, max_new_tokens: int = 256, *, sampling: Sampling = _GREEDY, stop: str | Sequence[str] = ()
    ) -> Generation:
        """Go on writing; parameters and errors as of :meth:`stream`."""
        return _drained(self.stream(max_new_tokens, sampling=sampling, stop=stop))
