"""The loop in which a session reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from everlong.reading.account import Account
from everlong.reading.interrupt import deferred_interrupt
from everlong.reading.passing import Learner, learn_what_left
from everlong.reading.reports import Progress, ReadReport
from everlong.reading.source import TextPieces, TokenPieces
from everlong.reading.tape import Tape


def read(
    tape: Tape,
    opened: TextPieces | TokenPieces,
    chunk: int,
    progress: Callable[[Progress], None] | None,
    learner: Learner | None,
    learn_progress: Callable[[Any], None] | None,
) -> ReadReport:
    """Read a source onto a tape; see ``Session.read``, for the user."""
    account = Account(tape)

    def run_whole_chunks(fraction: float | None) -> None:
        while len(tape.queue) > chunk:
            tape.run_chunk(chunk, logits=False)
            if progress is not None:
                progress(account.progress(fraction))
            if learner is not None:
                learn_what_left(tape, learner, learn_progress)

    for piece in opened:
        with deferred_interrupt():
            tape.take(piece, learns=learner is not None)
        run_whole_chunks(opened.fraction)
    with deferred_interrupt():
        tape.accept(tape.text.settle())
    run_whole_chunks(1.0)
    tape.run_all(chunk, logits=not tape.text.tail)
    if learner is not None:
        learn_what_left(tape, learner, learn_progress)
    if progress is not None:
        progress(account.progress(None, finished=True))
    return account.report(None if learner is None else learner.report())
