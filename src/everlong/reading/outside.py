"""Methods that drive a model from outside: sources and a question in, an answer out.

Such a method knows the question before it reads, and each question is read for anew. A session, which reads
without knowing what will be asked, follows an attention policy instead.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from everlong.attention import POLICIES, FullAttention, StreamCache
from everlong.attention.merging import Merging
from everlong.errors import ConfigurationError, InputError
from everlong.reading.attached import AttachedModel
from everlong.reading.detokenize import checked_stop
from everlong.reading.reports import Generation, Progress
from everlong.reading.sampling import GREEDY, Sampling
from everlong.reading.sentences import SentenceCutter
from everlong.reading.source import Source, open_source
from everlong.reading.tape import Tape
from everlong.reading.tokens import TokenStream
from everlong.reading.writing import checked_count, checked_speculation, write
from everlong.registry import Registry, make

FORWARD = 512
"""Tokens of one forward."""


@dataclass(frozen=True)
class ReadingMethod(ABC):
    """A way to read sources for one question. Subclass as a frozen dataclass, its fields the options."""

    @abstractmethod
    def answer(self, task: Task) -> Generator[str, Any, Generation]:
        """Read for a question and write the answer, yielding its text as it comes."""


READING_METHODS: Registry[type[ReadingMethod]] = Registry("reading method")


def reading_method(name: str) -> Callable[[type[ReadingMethod]], type[ReadingMethod]]:
    """Decorate a method to register it; who takes it for an attention policy is told what it is."""
    POLICIES.refer(
        name,
        "it reads for one question, which it knows before. From the command line: everlong ask QUESTION "
        f"FILE... --method {name}; in Python: llm.ask(source, question, method={name!r})",
    )
    return READING_METHODS.register(name)


def make_reading_method(name: str, options: dict[str, Any] | None = None) -> ReadingMethod:
    """Make a registered method from its name and options, as :func:`everlong.make_policy` does.

    Raises
    ------
    UnknownNameError
        No such method, or no such option; near matches are listed.
    ConfigurationError
        It is an attention policy, or a value that cannot work.
    """
    if name in POLICIES:
        raise ConfigurationError(
            f"{name} is an attention policy, which reads without knowing the question: "
            f"everlong read FILE... --attention {name} --ask QUESTION, or llm.session({name!r})"
        )
    return make(READING_METHODS, name, options)


@dataclass(frozen=True)
class Task:
    """What is to be read, for which question, and how the answer is written.

    Attributes
    ----------
    model : AttachedModel
        Who reads.
    sources : sequence of Source
        Read one behind the other.
    question : str
        The question.
    system : str or None
        Text that the conversation begins with.
    max_new_tokens, sampling, stop, speculate
        As of ``Session.ask``.
    progress : callable or None
        Called now and then while reading.
    """

    model: AttachedModel
    sources: Sequence[Source]
    question: str
    system: str | None = None
    max_new_tokens: int = 256
    sampling: Sampling = GREEDY
    stop: str | Sequence[str] = ()
    speculate: str | None = None
    progress: Callable[[Progress], None] | None = None
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.model.require_attached()
        if not self.question:
            raise InputError("the question is empty: what is read depends on it, so give one")
        if self.system is not None and not self.system:
            raise InputError("the system text is empty: give one, or none at all")
        if not self.sources:
            raise InputError("there is no source: give a text, a path or an open file to read")
        checked_count(self.max_new_tokens)
        checked_stop(self.stop)


class Errand:
    """One task under way: the conversation around the text, what was read of it, and what that took.

    Parameters
    ----------
    task : Task
        What to do.
    longest : int
        Tokens of a sentence at most.
    """

    def __init__(self, task: Task, longest: int) -> None:
        self.task = task
        self._longest = longest
        tape = Tape(task.model, self.new_cache(), task.system, False)
        self.way = checked_speculation(task.speculate, tape)
        tape.generator.seed()
        tape.begin_text()
        tape.finish()
        self._opened = tape
        self.opening = list(tape.queue)
        """Ids that the conversation begins with."""
        form, coder = tape.form, task.model.coder
        self.question_tokens = len(coder.encode_after(form.question(task.question, after_text=True)))
        """Tokens of the question, without the markup behind it."""
        self.around = len(self.laid_out([]).queue)
        """Tokens around the text."""
        self.taken = 0
        """Tokens of the text that were taken from its sources."""
        self.seconds = 0.0
        """In the model, before the answer's own stream."""
        self._fraction: float | None = 0.0

    def new_cache(self) -> StreamCache:
        """Return an empty cache under full attention."""
        return self.task.model.attachment.new_cache(FullAttention())

    def room(self, method: ReadingMethod, least: int, what: str) -> int | None:
        """Return how many tokens of text the training length leaves; None: it is not known.

        Raises
        ------
        ConfigurationError
            They are fewer than the `least` that `method` needs, for `what`.
        """
        length = self.task.model.attachment.training_length
        if length is None:
            return None
        room = length - self.around - self.task.max_new_tokens
        if room < least:
            raise ConfigurationError(
                f"{type(method).__name__}: the model was trained on {length} tokens. What stands around the "
                f"text, the question above all, takes {self.around}, the answer up to "
                f"{self.task.max_new_tokens}: {max(room, 0)} are left, fewer than {what}. Use smaller "
                "ones, or write less"
            )
        return room

    # --- reading -----------------------------------------------------------------------------------

    def sentences(self) -> Iterator[list[int]]:
        """Yield the sentences of the sources, as token ids."""
        cutter = SentenceCutter(self.task.model.tokenizer, self._longest)
        for ids in self._ids():
            self.taken += len(ids)
            yield from cutter.feed(ids)
        yield from cutter.finish()

    def text(self) -> list[int]:
        """Return the token ids of the sources, all at once; see :meth:`ran_of`."""
        return list(chain.from_iterable(self._ids()))

    def _ids(self) -> Iterator[list[int]]:
        """Yield the ids of the sources as of one text."""
        model, count = self.task.model, len(self.task.sources)
        text = TokenStream(model.coder, fresh=self._opened.text.fresh)
        for number, source in enumerate(self.task.sources):
            with closing(open_source(source, model.vocabulary)) as opened:
                for piece in opened:
                    ids = text.feed(piece) if isinstance(piece, str) else [*text.finish(), *piece]
                    self._fraction = None if opened.fraction is None else (number + opened.fraction) / count
                    yield ids
        self._fraction = 1.0
        yield text.finish()

    def laid_out(self, ids: Sequence[int]) -> Tape:
        """Return a tape on which a text waits to be run, in the conversation, the question behind it."""
        tape = self._opened.fork()
        tape.take(list(ids))
        tape.text.fresh = False
        tape.ask(self.task.question)
        return tape

    def asked(self, cache: StreamCache) -> Tape:
        """Return a tape on which the question waits, behind a cache that has read everything before."""
        tape = self.laid_out([])
        tape.queue = tape.queue[len(self.opening) :]
        tape.driver.cache = cache
        return tape

    def ran(self, seconds: float, cache: StreamCache | Merging) -> None:
        """Note how long the model took for some tokens, and tell of it."""
        self.seconds += seconds
        if self.task.progress is None:
            return
        since = time.perf_counter() - self.task.started
        total = None if not self._fraction else max(self.taken, round(self.taken / self._fraction))
        self.task.progress(Progress(self.taken, total, since, self.taken / since, None, cache.bytes()))

    def ran_of(self, done: int, whole: int, seconds: float, cache: Merging) -> None:
        """Note, as of :meth:`ran`, that `done` of the `whole` tokens of :meth:`text` were run."""
        self.taken, self._fraction = done, done / whole if whole else 1.0
        self.ran(seconds, cache)

    # --- writing -----------------------------------------------------------------------------------

    def write(self, tape: Tape) -> Generator[str, Any, Generation]:
        """Write the answer on a tape, and report of all that was read for it."""
        task = self.task
        stop = (*tape.form.stop, *checked_stop(task.stop))
        generation = yield from write(
            tape, FORWARD, task.max_new_tokens, task.sampling, stop, self.way, task.started
        )
        stats, driver = generation.stats, tape.driver
        read = self.taken + self.around
        seconds = self.seconds + driver.seconds
        whole = replace(
            stats,
            tokens_read=read,
            forgotten=read + stats.tokens_written - stats.kept - stats.waiting,
            seconds=seconds,
            tokens_per_second=(read + stats.tokens_written) / seconds,
        )
        return replace(generation, stats=whole)
