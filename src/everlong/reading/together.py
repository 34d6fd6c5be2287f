"""Several sessions of one model that write at the same time, each as it would alone.

A forward costs the reading of all weights, whether it is for one stream or for eight. What waits to be read
goes through packed into rows; then each stream is a row of a batch and takes a token a step.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from everlong.attention import StreamCache
from everlong.attention.batch import StreamBatch
from everlong.attention.sequences import PackedSequences
from everlong.errors import ConfigurationError, InputError, StateError
from everlong.reading.attached import AttachedModel
from everlong.reading.detokenize import Detokenizer, checked_stop
from everlong.reading.driver import Driver
from everlong.reading.interrupt import deferred_interrupt
from everlong.reading.reports import Generation
from everlong.reading.sampling import Sampler, Sampling
from everlong.reading.session import Session
from everlong.reading.tape import Tape
from everlong.reading.writing import Page, checked_count


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
    return _written(tapes, chunk, count, samplings, stops, started)


def _written(
    tapes: Sequence[Tape],
    chunk: int,
    max_new_tokens: int,
    sampling: Sequence[Sampling],
    stop: Sequence[tuple[str, ...]],
    started: float,
) -> Generator[tuple[int, str], None, list[Generation]]:
    """Let the model go on from where each tape stands."""
    _read_all(tapes, chunk)
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
    with _rows_of(list(tapes)) as rows:
        while len(done) < len(tapes):
            writing = [number for number in pages if number not in done]
            with deferred_interrupt():
                if all(tapes[number].queue for number in writing):  # not before the first token
                    rows.step()
                for number in writing:
                    driver = tapes[number].driver
                    assert driver.logits is not None, "begin_writing() left nothing to go on from"
                    pages[number].take(samplers[number](driver.logits, driver.recent))
                rows.keep([tapes[number] for number in writing if pages[number].reason is None])
            for number in writing:
                page, tape = pages[number], tapes[number]
                pieces = page.texts()
                if page.reason is not None:
                    pieces += page.finish()
                    seconds = time.perf_counter() - started
                    done[number] = Generation(page.text, page.count, seconds, page.reason, tape.stats())
                for piece in pieces:
                    yield number, piece
    return [done[number] for number in range(len(tapes))]


def _read_all(tapes: Sequence[Tape], chunk: int) -> None:
    """Run everything that waits, `chunk` tokens at a time: of several tapes, where they are short."""
    while any(tape.queue for tape in tapes):
        room, pieces = chunk, []
        for tape in tapes:
            if tape.queue and room:
                pieces.append((tape, min(room, len(tape.queue))))
                room -= pieces[-1][1]
        with deferred_interrupt():
            _run_waiting(pieces)


def _run_waiting(pieces: Sequence[tuple[Tape, int]]) -> None:
    """Run so many of the tokens that wait on each tape."""
    before = [tape.driver.cache.seen for tape, _ in pieces]
    try:
        run_packed([tape.driver for tape, _ in pieces], [tape.queue[:count] for tape, count in pieces])
    finally:
        for (tape, count), seen in zip(pieces, before, strict=True):
            if tape.driver.cache.seen > seen:  # they went through, whatever came of it
                del tape.queue[:count]


@torch.inference_mode()
def run_packed(drivers: Sequence[Driver], chunks: Sequence[Sequence[int]]) -> None:
    """Run a chunk of each stream in one forward; each has the logits of its next token afterwards."""
    started = time.perf_counter()
    lead, counts = drivers[0], [len(chunk) for chunk in chunks]
    ids = torch.tensor([[token for chunk in chunks for token in chunk]], device=lead.device)
    ends = torch.tensor(counts).cumsum(0)
    wanted, sizes = [], []  # every logit of a stream whose surprisal is asked for, the last one of others
    for driver, count, end in zip(drivers, counts, ends.tolist(), strict=True):
        sizes.append(count if driver.surprisal else 1)
        wanted.append(torch.arange(end - sizes[-1], end, device=lead.device))
    model: Any = lead.attachment.model
    output = model(
        input_ids=ids,
        use_cache=True,
        logits_to_keep=torch.cat(wanted),
        **{lead.attachment.cache_argument: PackedSequences([d.cache for d in drivers], counts)},
    )
    seconds = (time.perf_counter() - started) / int(ends[-1])
    parts = torch.split(ids[0], counts), torch.split(output.logits[0], sizes)
    for driver, own, logits in zip(drivers, *parts, strict=True):
        surprisal = driver.took(own, logits, seconds * len(own))
        driver.cache.after_forward(own[None], None if surprisal is None else surprisal[None])


class _PackedRows:
    """Streams that cannot be the rows of one batch: their tokens are packed into one row."""

    def __init__(self, tapes: list[Tape]) -> None:
        self._tapes = tapes

    def step(self) -> None:
        """Run the token that waits on each tape."""
        _run_waiting([(tape, 1) for tape in self._tapes])

    def keep(self, tapes: list[Tape]) -> None:
        """Go on with these alone."""
        self._tapes = tapes


class _BatchRows:
    """Streams as the rows of one batch, lent by their tapes until they leave."""

    def __init__(self, tapes: list[Tape]) -> None:
        self._tapes = tapes
        self._attachment = tapes[0].driver.attachment
        self._batch: StreamBatch = self._attachment.batch([tape.driver.cache for tape in tapes])
        for tape in tapes:
            tape.driver.cache = cast(StreamCache, _Lent())

    @torch.inference_mode()
    def step(self) -> None:
        """Run the token that waits on each tape."""
        started = time.perf_counter()
        model: Any = self._attachment.model
        cache = self._batch.cache
        ids = torch.tensor([tape.queue for tape in self._tapes], device=self._tapes[0].driver.device)
        logits: Tensor = model(
            input_ids=ids, use_cache=True, **{self._attachment.cache_argument: cache}
        ).logits
        for tape in self._tapes:
            tape.queue = []
        cache.after_forward(ids, None)
        seconds = (time.perf_counter() - started) / len(ids)
        for tape, own, row in zip(self._tapes, ids, logits, strict=True):
            tape.driver.took(own, row, seconds)

    def keep(self, tapes: list[Tape]) -> None:
        """Give the others their streams back."""
        rows = [row for row, tape in enumerate(self._tapes) if tape in tapes]
        if len(rows) == len(self._tapes):
            return
        for row, tape in enumerate(self._tapes):
            if row not in rows:
                tape.driver.cache = self._batch.take(row)
        self._tapes = tapes
        if rows:
            self._batch.keep(rows)


class _Lent:
    """Stands for a stream that is part of a batch."""

    def __getattr__(self, name: str) -> NoReturn:
        raise StateError(
            "this session is writing together with others: take all of the text, or close() the generator, "
            "before using it for something else"
        )


@contextmanager
def _rows_of(tapes: list[Tape]) -> Generator[_BatchRows | _PackedRows, None, None]:
    """Put streams together for as long as the block lasts."""
    caches = [tape.driver.cache for tape in tapes]
    apart = len(tapes) == 1 or tapes[0].driver.attachment.why_apart(caches) is not None
    rows = _PackedRows(tapes) if apart else _BatchRows(tapes)
    try:
        yield rows
    finally:
        with deferred_interrupt():
            rows.keep([])
