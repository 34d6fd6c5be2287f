"""Opens a model and a session from a command's options, and shows what the session writes."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

import everlong
from everlong.cli.options import MethodOptions, ModelOptions, TierOptions
from everlong.cli.terminal import pull_progress
from everlong.errors import ConfigurationError
from everlong.models.files import human_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from everlong.llm import LLM
    from everlong.reading.reports import Generation, Stats
    from everlong.reading.session import Session

STANDARD_INPUT = "-"
Outcome = TypeVar("Outcome")


@contextmanager
def open_llm(
    model: ModelOptions,
    method: MethodOptions,
    *,
    weights: str,
    quiet: bool,
    below: TierOptions | None = None,
) -> Iterator[LLM]:
    """Load a model under a policy; it is closed at the end."""
    policy = method.policy()
    tier = (below or TierOptions()).tier()
    with pull_progress(quiet=quiet) as progress:
        llm = everlong.load(
            model.model, policy, weights=cast(Any, weights), tier=tier, **model.loading(progress)
        )
    with llm:
        yield llm


def open_session(
    llm: LLM,
    method: MethodOptions,
    *,
    system: str | None = None,
    state: Path | None = None,
    surprisal: bool = False,
    seed: int | None = None,
    memories: Sequence[str] | None = None,
    below: TierOptions | None = None,
) -> Session:
    """Restore the session saved in `state` if there is one, else begin one with `system` pinned.

    Raises
    ------
    ConfigurationError
        An option would change what the saved session has settled already, or its method has no tier.
    """
    if state is not None and state.exists():
        settled = {
            "--attention": method.attention is not None and not method.is_file,
            "--set": bool(method.settings),
            "--system": system is not None,
            "--surprisal": surprisal,
            "--seed": seed is not None,
            "--memory": bool(memories),
        }
        given = [name for name, is_given in settled.items() if is_given]
        if given:
            raise ConfigurationError(
                f"{state} goes on as it was begun: leave out {', '.join(given)}, or begin another state file"
            )
        session = llm.restore(state)
        (below or TierOptions()).check(llm, session.policy)
        return session
    (below or TierOptions()).check(llm, llm.attention)
    session = llm.session(surprisal=surprisal, seed=seed, memories=memories or ())
    if system is not None:
        session.pin(system)
    return session


def check_sources(files: Sequence[str]) -> None:
    """Refuse files that cannot be read, before a model is loaded."""
    from everlong.reading.source import open_source

    if list(files).count(STANDARD_INPUT) > 1:
        raise ConfigurationError("standard input (-) can be read once")
    for file in files:
        if file != STANDARD_INPUT and not Path(file).is_fifo():
            open_source(Path(file), 0).close()


def source_of(file: str) -> Path | BinaryIO:
    """Return what is read where a command was given `file`."""
    return sys.stdin.buffer if file == STANDARD_INPUT else Path(file)


def check_state(state: Path | None) -> None:
    """Refuse a state file that could not be written, before anything is done."""
    if state is not None and not state.parent.is_dir():
        raise ConfigurationError(f"cannot save to {state}: there is no folder {state.parent}")


def print_as_written(pieces: Generator[str, None, Outcome], *, silent: bool = False) -> Outcome:
    """Print a text as it is written, ending the line, and return the outcome."""

    def show(text: str) -> None:
        if not silent:
            sys.stdout.write(text)
            sys.stdout.flush()

    try:
        while True:
            show(next(pieces))
    except StopIteration as end:
        outcome: Outcome = end.value
        return outcome
    finally:
        pieces.close()
        show("\n")


def say_memory(console: Console, session: Session, answer: Generation) -> None:
    """Remark which memory an answer is from, where that is chosen."""
    from everlong.reading.memories import lasting

    if session.memories is not None and lasting(session.memories) is None:
        chosen = ", ".join(answer.memories) or "none"
        console.print(f"(memory: {chosen})", style="dim", markup=False, highlight=False)


def first_of(
    writing: Generator[tuple[int, str], None, list[Generation]],
) -> Generator[str, None, list[Generation]]:
    """Yield the text of the first of several that are written together; return all outcomes."""
    try:
        while True:
            number, piece = next(writing)
            if number == 0:
                yield piece
    except StopIteration as end:
        generations: list[Generation] = end.value
        return generations
    finally:
        writing.close()


def answered(question: str, answer: Generation) -> dict[str, Any]:
    """Return a question and its answer for JSON."""
    return {
        "question": question,
        "answer": answer.text,
        "tokens": answer.tokens,
        "seconds": answer.seconds,
        "stop_reason": answer.stop_reason,
        "memories": answer.memories,
    }


def account(stats: Stats) -> dict[str, Any]:
    """Return a session's accounts for JSON."""
    return dataclasses.asdict(stats)


def in_words(stats: Stats) -> str:
    """Return a session's accounts as one line."""
    perplexity = "" if stats.perplexity is None else f", perplexity {stats.perplexity:,.2f}"
    always = {"kept": stats.kept, "forgotten": stats.forgotten}
    counts = {"kept": stats.kept, "recallable": stats.recallable, **always, "waiting": stats.waiting}
    return (
        f"{stats.tokens_read:,} tokens read, {stats.tokens_written:,} written: "
        + ", ".join(f"{count:,} {word}" for word, count in counts.items() if count or word in always)
        + f"; {human_bytes(sum(stats.bytes.values()))} held; "
        f"{stats.seconds:,.1f} s in the model, {stats.tokens_per_second:,.0f} tokens/s{perplexity}"
    )
