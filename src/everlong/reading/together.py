"""Several sessions of one model that write at the same time, each as it would alone."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import Any, cast

from everlong.errors import ConfigurationError, InputError
from everlong.reading.attached import AttachedModel
from everlong.reading.detokenize import Detokenizer, checked_stop
from everlong.reading.interrupt import deferred_interrupt
from everlong.reading.reports import Generation
from everlong.reading.rows import read_all, rows_of
from everlong.reading.sampling import Sampler, Sampling
from everlong.reading.session import Session
from everlong.reading.tape import Tape
from everlong.reading.writing import Page, checked_count, handed_out


def stream_together(
    model: AttachedModel,
    sessions: Sequence[Session],
    max_new_tokens: int,
    *,
    questions: Sequence[str] | None,
    keep: bool,
    sampling: Sampling | Sequence[Sampling],
    stop: str | Sequence[str],
) -> Generator[tuple[int, str], None, list[Generation]]:
    """Let sessions go on writing, or answer; see ``LLM.stream_together``, for the user."""
    started, count, strings = time.perf_counter(), checked_count(max_new_tokens), checked_stop(stop)
    if not sessions:
        raise InputError("there is no session to write: give at least one")
    if any(session.model is not model for session in sessions):
        raise InputError("sessions that write together are of the same loaded model, each its own stream")
    if (questions is None or keep) and len({id(session) for session in sessions}) != len(sessions):
        raise InputError("a session goes on in one way at a time: fork() it to go on in several")
    if questions is not None and (isinstance(questions, str) or len(questions) != len(sessions)):
        raise InputError(f"{len(sessions)} sessions need as many questions, in a list")
    if questions is not None and not all(questions):
        raise InputError("one of the questions is empty")
    samplings = [sampling] * len(sessions) if isinstance(sampling, Sampling) else list(sampling)
    if len(samplings) != len(sessions):
        raise ConfigurationError(f"{len(sessions)} sessions need one sampling, or as many: {len(samplings)}")
    if questions is None:
        tapes = [session.to_go_on() for session in sessions]
        stops = [strings] * len(tapes)
    else:
        tapes = [
            session.to_answer(question, keep=keep)
            for session, question in zip(sessions, questions, strict=True)
        ]
        stops = [(*tape.form.stop, *strings) for tape in tapes]
    chunk = min(session.chunk for session in sessions)
    return write_tapes(tapes, chunk, count, samplings, stops, started)


def write_tapes(
    tapes: Sequence[Tape],
    chunk: int,
    max_new_tokens: int,
    sampling: Sequence[Sampling],
    stop: Sequence[tuple[str, ...]],
    started: float,
    *,
    moved: bool = False,
) -> Generator[tuple[int, str], Any, list[Generation]]:
    """Let the model go on from where each tape stands.

    `moved`: their streams move into the batch instead of being copied, and are of no use after an error in
    between.
    """
    read_all(tapes, chunk)
    pages: dict[int, Page] = {}
    samplers = []
    for number, tape in enumerate(tapes):
        tape.end_of_read()
        if sampling[number].seed is not None:
            tape.generator.manual_seed(cast(int, sampling[number].seed))
        samplers.append(Sampler(sampling[number], tape.generator))
        detokenizer = Detokenizer(tape.model.tokenizer, list(tape.driver.recent)[-16:], stop[number])
        pages[number] = Page(tape, detokenizer, max_new_tokens)
    done: dict[int, Generation] = {}
    undisturbed = False
    with rows_of(list(tapes), moved=moved) as rows:
        while len(done) < len(tapes):
            writing = [number for number in pages if number not in done]
            with deferred_interrupt():
                if all(tapes[number].queue for number in writing):  # not before the first token
                    rows.step(undisturbed)
                for number in writing:
                    driver = tapes[number].driver
                    assert driver.logits is not None, "begin_writing() left nothing to go on from"
                    pages[number].take(samplers[number](driver.logits, driver.recent))
                rows.keep([tapes[number] for number in writing if pages[number].reason is None])
            undisturbed = True
            for number in writing:
                page, tape = pages[number], tapes[number]
                pieces = page.texts()
                if page.reason is not None:
                    pieces += page.finish()
                    seconds = time.perf_counter() - started
                    account = tape.stats(), tape.memory_names
                    done[number] = Generation(page.text, page.count, seconds, page.reason, *account)
                alone = yield from handed_out((number, piece) for piece in pieces)
                undisturbed = undisturbed and alone
    return [done[number] for number in range(len(tapes))]
