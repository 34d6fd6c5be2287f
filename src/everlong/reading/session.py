"""A session: one stream of text, read and written without end."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Self

from everlong.attention import Policy, make_policy, policy_options, with_sinks
from everlong.errors import ConfigurationError, InputError, StateError, UnknownNameError
from everlong.reading.account import Account
from everlong.reading.attached import AttachedModel
from everlong.reading.detokenize import checked_stop
from everlong.reading.interrupt import deferred_interrupt
from everlong.reading.memories import Memories, Recall, Router, beginning, lasting, recalled, route, to_saved
from everlong.reading.prompts import pinned_text
from everlong.reading.reports import Generation, Progress, ReadReport, Score, Stats
from everlong.reading.sampling import GREEDY, Sampling
from everlong.reading.scoring import score
from everlong.reading.source import Source, open_source
from everlong.reading.state import read_state, write_state
from everlong.reading.tape import Tape
from everlong.reading.writing import checked_count, checked_speculation, drained, write


class Session:
    """One stream of text through one model. Made by ``llm.session()``; for one thread at a time.

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
        Of the random draws. A fork of a session with a seed draws what its original would; without one,
        each fork and each question draws something new.
    memories : Memories or Router, optional
        What the model knows by heart in this stream; or what chooses it, each time the model is to write.
        What is chosen reads what waits then, a question above all, and writes; the rest is read without.
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
        memories: Memories | Router | None = None,
    ) -> None:
        if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1:
            raise ConfigurationError(f"chunk={chunk!r} cannot work: it must be a whole number of at least 1")
        if system is not None and not system:
            raise InputError("the system text is empty: give one, or none at all")
        Sampling(seed=seed)  # checks it
        self.model = model
        self._policy = policy
        self._system = system
        self.chunk = chunk
        self._surprisal = surprisal
        self._seed = seed
        self.memories = memories
        self._tape = self._new_tape()

    # --- reading -----------------------------------------------------------------------------------

    def read(self, source: Source, *, progress: Callable[[Progress], None] | None = None) -> ReadReport:
        """Read a text of any length into the stream.

        Ctrl-C takes effect between chunks. What was taken from the source by then stays read, and
        ``session.read(file)`` goes on where an open file stands.

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
        self.model.require_attached()
        opened = open_source(source, self.model.vocabulary)
        tape, account = self._tape, Account(self._tape)
        tape.use(lasting(self.memories))

        def run_whole_chunks(fraction: float | None) -> None:
            while len(tape.queue) > self.chunk:
                tape.run_chunk(self.chunk, logits=False)
                if progress is not None:
                    progress(account.progress(fraction))

        with closing(opened):
            for piece in opened:
                with deferred_interrupt():
                    tape.take(piece)
                run_whole_chunks(opened.fraction)
        with deferred_interrupt():
            tape.accept(tape.text.settle())
        run_whole_chunks(1.0)
        tape.run_all(self.chunk, logits=not tape.text.tail)
        if progress is not None:
            progress(account.progress(None, finished=True))
        return account.report()

    def pin(self, text: str) -> ReadReport:
        """Read a text that is never forgotten: its tokens, and the turn's opening, become sinks.

        Parameters
        ----------
        text : str
            Instructions, usually. A blank line is added where it does not end with a line.

        Raises
        ------
        StateError
            Something was read before.
        ConfigurationError
            The text leaves no room in the window.
        UnsupportedUseError
            The policy keeps no sinks.
        """
        self.model.require_attached()
        if self._tape.place != "start":
            raise StateError("pin() comes before everything else: call reset() first, or begin a new session")
        text = pinned_text(text)
        tape = self._tape.fork()
        tape.take(text)
        tape.finish()
        policy = with_sinks(tape.driver.cache.policy, tape.driver.cache.seen + len(tape.queue))
        prefix = beginning(self.memories)
        tape.driver.cache = self.model.attachment.new_cache(policy, prefix=prefix)
        tape.use(lasting(self.memories))
        account = Account(self._tape)
        self._tape = account.tape = tape
        tape.run_all(self.chunk, logits=True)
        return account.report()

    def score(self, text: str) -> Score:
        """Tell how well the model predicts that the stream goes on with `text`; the session stays as it is.

        Parameters
        ----------
        text : str
            Tokenised by itself, after everything read.
        """
        self.model.require_attached()
        tape = self._tape.fork()
        tape.use(lasting(self.memories))
        return score(tape, text, self.chunk, begins=self._system is not None)

    # --- writing -----------------------------------------------------------------------------------

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

    def to_go_on(self) -> Tape:
        """Return the session's tape, ready for the model to write on it."""
        self.model.require_attached()
        self._tape.begin_writing()
        self._tape = route(self._tape, self.memories, self._tape.latest(), self.chunk)
        return self._tape

    def to_answer(self, question: str, *, keep: bool) -> Tape:
        """Return a tape ready for the answer to a question: the session's own, or a fork's."""
        if not question:
            raise InputError("the question is empty")
        tape = (self if keep else self.fork())._tape
        with deferred_interrupt():
            tape.ask(question)
        tape = route(tape, self.memories, question, self.chunk)
        if keep:
            self._tape = tape
        return tape

    # --- copies, state, accounts -------------------------------------------------------------------

    def fork(self) -> Session:
        """Return an independent copy."""
        self.model.require_attached()
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy._tape = self._tape.fork()
        if self._seed is None:
            copy._tape.generator.seed()
        return copy

    def reset(self) -> None:
        """Forget everything read, written and pinned; the session's options and its system text stay."""
        self._tape = self._new_tape()

    def _new_tape(self) -> Tape:
        self.model.require_attached()
        cache = self.model.attachment.new_cache(self._policy, prefix=beginning(self.memories))
        tape = Tape(self.model, cache, self._system, self._surprisal)
        tape.use(lasting(self.memories))
        if self._seed is None:
            tape.generator.seed()
        else:
            tape.generator.manual_seed(self._seed)
        return tape

    def save(self, path: str | Path) -> None:
        """Write the session to a file, from which ``llm.restore(path)`` goes on bit by bit.

        Raises
        ------
        StateError
            The file cannot be written; what was there is untouched.
        """
        tensors, tape = self._tape.state()
        options = {
            "policy": None if self._policy is None else policy_options(self._policy),
            "system": self._system,
            "chunk": self.chunk,
            "surprisal": self._surprisal,
            "seed": self._seed,
            "memories": to_saved(self.memories),
        }
        write_state(path, self.model, tensors, {"options": options, "tape": tape})

    @classmethod
    def restore(cls, model: AttachedModel, path: str | Path, recall: Recall | None = None) -> Self:
        """Rebuild a session that :meth:`save` wrote, `recall` loading its memories; see ``llm.restore``.

        Raises
        ------
        InputError
            The file is missing, cut short, or something else.
        StateError
            It is of other weights, another tokenizer, or another format.
        """
        model.require_attached()
        tensors, saved = read_state(path, model)
        try:
            options: dict[str, Any] = saved["options"]
            policy = None if options["policy"] is None else make_policy(*options["policy"])
            rest = {name: options[name] for name in ("system", "chunk", "surprisal", "seed")}
            memories = recalled(options["memories"], recall)
            session = cls(model, policy=policy, memories=memories, **rest)
            session._tape = Tape.restored(model, tensors, saved["tape"])
            session._tape.use(lasting(memories))
        except UnknownNameError:
            raise
        except KeyError as error:
            raise StateError(
                f"{path} is not complete: {error} is missing; restore an earlier copy"
            ) from error
        return session

    @property
    def stats(self) -> Stats:
        """The session's accounts."""
        return self._tape.stats()

    @property
    def policy(self) -> Policy:
        """The policy this stream follows, its defaults filled in, its sinks raised by :meth:`pin`."""
        policy: Policy = self._tape.driver.cache.policy
        return policy

    def __repr__(self) -> str:
        return f"Session({self.model.name!r}, {self.policy!r}, tokens={self._tape.driver.tokens})"
