"""The loop in which a model writes."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor

from everlong.attention import Policy
from everlong.attention.branches import Branches
from everlong.errors import ConfigurationError, UnsupportedUseError
from everlong.reading.detokenize import Detokenizer
from everlong.reading.interrupt import deferred_interrupt
from everlong.reading.reports import Generation, StopReason
from everlong.reading.sampling import Sampler, Sampling
from everlong.reading.speculation import SPECULATORS, Draft, Speculator
from everlong.reading.tape import Tape

Outcome = TypeVar("Outcome")

_UNDISTURBED = object()
"""What :func:`drained` answers to each piece of text."""


def checked_count(max_new_tokens: int) -> int:
    """Return how many tokens to write at most; raise unless there is at least one."""
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
        raise ConfigurationError(f"max_new_tokens={max_new_tokens!r} cannot work: it must be at least 1")
    return max_new_tokens


def checked_speculation(speculate: str | None, tape: Tape) -> type[Speculator] | None:
    """Return the way to guess that goes by a name of ``SPECULATORS``; None: none.

    Raises
    ------
    UnknownNameError
        There is no such way.
    UnsupportedUseError
        This stream, or its policy, does not take it.
    """
    speculator_of = None if speculate is None else SPECULATORS[speculate]
    if speculator_of is not None and tape.driver.surprisal:
        raise UnsupportedUseError(
            "speculation does not report the surprisal of each token, which this session or its policy "
            "asks for: leave speculate out, or begin a session without surprisal=True"
        )
    policy = tape.driver.cache.policy
    if speculator_of is not None and type(policy).observe is not Policy.observe:
        raise UnsupportedUseError(
            f"{type(policy).__name__} takes note of tokens as they are read, so that none can be taken back: "
            "leave speculate out"
        )
    is_growing = policy.span is None or tape.driver.cache.seen < policy.span
    if speculator_of is not None and is_growing and tape.driver.attachment.tables_change(policy):
        raise UnsupportedUseError(
            f"the rotary table that {type(policy).__name__} uses follows the length of the stream, so "
            "guesses that are checked together would not be what it writes one by one: leave speculate out"
        )
    if speculator_of is not None and speculator_of.branches and not policy.takes_branches:
        raise UnsupportedUseError(
            f"{type(policy).__name__} does not take tokens that follow in several ways, as "
            f"speculate={speculate!r} guesses them: use speculate='prompt-lookup', or leave it out"
        )
    return speculator_of


def write(
    tape: Tape,
    chunk: int,
    max_new_tokens: int,
    sampling: Sampling,
    stop: tuple[str, ...],
    speculator_of: type[Speculator] | None,
    started: float,
) -> Generator[str, Any, Generation]:
    """Let the model go on from where the tape stands; yield the text as it comes.

    The last token written waits on the tape: it is run when there is a use for what comes after it.

    Parameters
    ----------
    tape : Tape
        With at least one token on it.
    chunk : int
        Tokens run at a time before the first is written.
    max_new_tokens : int
        Tokens to write at most.
    sampling : Sampling
        How each is chosen.
    stop : tuple of str
        Texts at which to stop.
    speculator_of : type or None
        How tokens to come are guessed; see :func:`checked_speculation`.
    started : float
        ``time.perf_counter()`` when the text was asked for.
    """
    driver = tape.driver
    tape.run_all(chunk, logits=True)
    tape.end_of_read()
    if sampling.seed is not None:
        tape.generator.manual_seed(sampling.seed)
    sampler = Sampler(sampling, tape.generator)
    speculator = None if speculator_of is None else speculator_of(driver.recent)
    page = Page(tape, Detokenizer(tape.model.tokenizer, list(driver.recent)[-16:], stop), max_new_tokens)
    undisturbed = False
    while page.reason is None:
        draft = speculator.guess() if speculator is not None and tape.queue else Draft()
        ids, branches = _drafted(tape, draft, page.room)
        has_run = bool(tape.queue)  # or else the next step is the first since whoever had the session
        if len(ids) > 1:
            assert speculator is not None
            before = page.count
            with deferred_interrupt():
                logits = _run_drafted(tape, page, sampler, ids, branches)
            speculator.judged(min(page.count - before, len(ids)) - 1, logits)
        else:
            if has_run:
                tape.run_chunk(1, logits=True, undisturbed=undisturbed)
            assert driver.logits is not None, "begin_writing() left nothing to go on from"
            page.take(sampler(driver.logits, driver.recent))
        if speculator is not None:
            for token in page.tokens:
                speculator.add(token)
        undisturbed = (yield from handed_out(page.texts())) and has_run
    yield from handed_out(page.finish())
    seconds = time.perf_counter() - started
    return Generation(page.text, page.count, seconds, page.reason, tape.stats(), tape.memory_names)


class Page:
    """What is being written: chosen tokens, their text, and whether that is the end."""

    def __init__(self, tape: Tape, detokenizer: Detokenizer, max_new_tokens: int) -> None:
        self._tape = tape
        self._detokenizer = detokenizer
        self._limit = max_new_tokens
        self._pieces: list[str] = []
        self._shown = 0
        self.count = 0
        self.reason: StopReason | None = None
        self.tokens: list[int] = []
        """Taken since :meth:`texts` was called last."""

    @property
    def room(self) -> int:
        """Tokens that may still be written."""
        return self._limit - self.count

    @property
    def text(self) -> str:
        """All that was written."""
        return "".join(self._pieces)

    def take(self, token: int) -> None:
        """Write down the next token; it waits on the tape, unless it ends the text."""
        self._tape.queue = []
        if token in self._tape.model.end_tokens:
            self.reason = "eos"
            return
        self._tape.queue = [token]
        self._tape.written += 1
        self.count += 1
        self.tokens.append(token)
        self._pieces.append(self._detokenizer.put(token))
        if self._detokenizer.stopped:
            self.reason = "stop"
        elif not self.room:
            self.reason = "length"

    def texts(self) -> list[str]:
        """Return the pieces of text not returned before."""
        fresh = [piece for piece in self._pieces[self._shown :] if piece]
        self._shown, self.tokens = len(self._pieces), []
        return fresh

    def finish(self) -> list[str]:
        """Return what was held back at the end."""
        self._pieces.append(self._detokenizer.finish())
        if self._detokenizer.stopped:
            self.reason = "stop"
        return self.texts()


def _drafted(tape: Tape, draft: Draft, room: int) -> tuple[list[int], Branches | None]:
    """Return the waiting token and what may follow it, as far as there is room for it and it can be run."""
    if draft.parents is None:
        until = tape.driver.cache.policy.guessed_until()
        room = room if until is None else min(room, until - tape.driver.cache.seen)
        return [*tape.queue, *draft.tokens[: max(room - 1, 0)]], None
    branches = Branches([-1, *draft.parents])
    if not tape.driver.cache.takes_branches(branches.height):
        return tape.queue, None
    return [*tape.queue, *draft.tokens], branches


def _run_drafted(
    tape: Tape, page: Page, sampler: Sampler, ids: Sequence[int], branches: Branches | None
) -> Tensor:
    """Run the waiting token and a draft; go on as far as the model chooses it too. Return the logits."""
    parents = range(-1, len(ids) - 1) if branches is None else branches.parents
    children = {
        (parent, token): number for number, (parent, token) in enumerate(zip(parents, ids, strict=True))
    }
    recent = [*tape.driver.recent]

    def judge(logits: Tensor) -> Iterator[int]:
        number: int | None = 0
        while number is not None:
            recent.append(ids[number])
            chosen = sampler(logits[number], recent)
            page.take(chosen)
            yield number
            number = None if page.reason is not None else children.get((number, chosen))

    return tape.driver.run_tentatively(ids, judge, branches)


def handed_out(pieces: Iterable[Any]) -> Generator[Any, Any, bool]:
    """Yield pieces of what is written; return whether nothing but Everlong's own code has run meanwhile."""
    undisturbed = True
    for piece in pieces:
        undisturbed = (yield piece) is _UNDISTURBED and undisturbed
    return undisturbed


def drained(writing: Generator[Any, Any, Outcome]) -> Outcome:
    """Run a writing to its end and return the outcome."""
    answer = None
    while True:
        try:
            writing.send(answer)
            answer = _UNDISTURBED
        except StopIteration as end:
            outcome: Outcome = end.value
            return outcome
