"""What a session writes: it goes on with its stream, answers, and chats."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence

from everlong.reading.detokenize import checked_stop
from everlong.reading.reports import Generation
from everlong.reading.sampling import GREEDY, Sampling
from everlong.reading.tape import Tape
from everlong.reading.writing import checked_count, checked_speculation, drained, write


class SessionWriting(ABC):
    """The half of a session that writes."""

    chunk: int
    _tape: Tape

    @abstractmethod
    def to_go_on(self) -> Tape:
        """Return the session's tape, ready for the model to write on it."""

    @abstractmethod
    def to_answer(self, question: str, *, keep: bool) -> Tape:
        """Return a tape ready for the answer to a question: the session's own, or a fork's."""

    def stream(
        self,
        max_new_tokens: int = 256,
        *,
        sampling: Sampling = GREEDY,
        stop: str | Sequence[str] = (),
        speculate: str | None = None,
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
        speculate : {"prompt-lookup", "lookahead"}, optional
            Guess tokens to come and run several at once; what is written stays the same.

        Returns
        -------
        generator of str
            Its return value is the :class:`Generation`.

        Raises
        ------
        InputError
            Nothing was read, and the model has no start token to begin from.
        UnsupportedUseError
            The session computes surprisal, or its policy does not take the way to speculate.
        NumericalError
            The logits are not finite.
        """
        count = checked_count(max_new_tokens)
        strings = checked_stop(stop)
        way, started = checked_speculation(speculate, self._tape), time.perf_counter()
        return write(self.to_go_on(), self.chunk, count, sampling, strings, way, started)

    def generate(
        self,
        max_new_tokens: int = 256,
        *,
        sampling: Sampling = GREEDY,
        stop: str | Sequence[str] = (),
        speculate: str | None = None,
    ) -> Generation:
        """Go on writing and return the whole; parameters and errors as of :meth:`stream`."""
        return drained(self.stream(max_new_tokens, sampling=sampling, stop=stop, speculate=speculate))

    def stream_answer(
        self,
        question: str,
        *,
        keep: bool = False,
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        stop: str | Sequence[str] = (),
        speculate: str | None = None,
    ) -> Generator[str, None, Generation]:
        """Answer a question as :meth:`ask` does, and yield the text as it comes."""
        count = checked_count(max_new_tokens)
        strings = checked_stop(stop)
        way, started = checked_speculation(speculate, self._tape), time.perf_counter()
        tape = self.to_answer(question, keep=keep)
        return write(tape, self.chunk, count, sampling, (*tape.form.stop, *strings), way, started)

    def ask(
        self,
        question: str,
        *,
        keep: bool = False,
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        stop: str | Sequence[str] = (),
        speculate: str | None = None,
    ) -> Generation:
        """Answer a question about what was read.

        The question ends the user's turn in which the text was read. A model without a chat template is
        given ``Question: ... Answer:``.

        Parameters
        ----------
        question : str
            The question.
        keep : bool
            Whether question and answer stay in the stream; by default the session stays as it is.
        max_new_tokens, sampling, stop, speculate
            As of :meth:`stream`.
        """
        return drained(
            self.stream_answer(
                question,
                keep=keep,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                stop=stop,
                speculate=speculate,
            )
        )

    def chat(
        self,
        message: str,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        stop: str | Sequence[str] = (),
        speculate: str | None = None,
    ) -> Generation:
        """Say something and return the answer; both stay in the stream. Parameters as of :meth:`ask`."""
        return self.ask(
            message,
            keep=True,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            speculate=speculate,
        )
