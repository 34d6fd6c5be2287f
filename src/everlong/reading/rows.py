"""Several streams of one model in the same forwards: read packed into rows, written as rows of a batch.

A forward costs the reading of all weights, whether it is for one stream or for eight.
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
from everlong.errors import NumericalError, StateError
from everlong.models.packing import MOST_ROWS
from everlong.reading.driver import Driver
from everlong.reading.interrupt import deferred_interrupt
from everlong.reading.tape import Tape


def read_all(tapes: Sequence[Tape], chunk: int) -> None:
    """Run everything that waits, `chunk` tokens at a time: of several tapes, where they are short.

    What would be read by packed weights if it were alone, as up to ``MOST_ROWS`` tokens are, is so here too.
    """
    few = min(chunk, MOST_ROWS) if tapes[0].model.packed_as != "float" else 0
    while waiting := [tape for tape in tapes if tape.queue]:
        counts = [min(chunk, len(tape.queue)) for tape in waiting]
        are_few = counts[0] <= few
        room = few if are_few else chunk
        pieces = []
        for tape, count in zip(waiting, counts, strict=True):
            if _group(tape) == _group(waiting[0]) and (count <= few) == are_few and count <= room:
                pieces.append((tape, count))
                room -= count
        pieces.sort(key=lambda piece: _memory(piece[0]))
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
    """Run a chunk of each stream in one forward; each has the logits of its next token afterwards.

    Raises
    ------
    NumericalError
        What the model computed of one of them is not finite; the others have taken note of theirs.
    """
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
    of_streams = torch.split(ids[0], counts), torch.split(output.logits[0], sizes)
    with _noted_by_all(drivers, *of_streams, seconds=time.perf_counter() - started) as surprisals:
        for driver, own, surprisal in zip(drivers, of_streams[0], surprisals, strict=True):
            if surprisal is not None or not driver.cache.needs_surprisal:  # of one that failed there is none
                driver.cache.after_forward(own[None], None if surprisal is None else surprisal[None])


@contextmanager
def _noted_by_all(
    drivers: Sequence[Driver], ids: Sequence[Tensor], logits: Sequence[Tensor], *, seconds: float
) -> Generator[list[Tensor | None], None, None]:
    """Let each stream take note of its tokens and logits; what failed in one is raised after the block."""
    tokens = sum(len(own) for own in ids)
    found: list[Tensor | None] = []
    errors: list[NumericalError] = []
    for driver, own, after in zip(drivers, ids, logits, strict=True):
        try:
            found.append(driver.took(own, after, seconds * len(own) / tokens))
        except NumericalError as error:
            found.append(None)
            errors.append(error)
    yield found
    if errors:
        raise errors[0]


class PackedRows:
    """Streams that cannot be the rows of one batch: their tokens are packed into one row."""

    def __init__(self, tapes: list[Tape]) -> None:
        self._tapes = tapes

    def step(self, undisturbed: bool) -> None:
        """Run the token that waits on each tape, always eagerly: what has run before is all the same."""
        for group in dict.fromkeys(map(_group, self._tapes)):
            _run_waiting([(tape, 1) for tape in self._tapes if _group(tape) == group])

    def keep(self, tapes: list[Tape]) -> None:
        """Go on with these alone."""
        self._tapes = [tape for tape in self._tapes if tape in tapes]


class BatchRows:
    """Streams as the rows of one batch, lent by their tapes until they leave.

    Streams that are moved, not copied, are of no use after an error in between.
    """

    def __init__(self, tapes: list[Tape], *, moved: bool) -> None:
        self._tapes = tapes
        self._attachment = tapes[0].driver.attachment
        caches = [tape.driver.cache for tape in tapes]
        self._batch: StreamBatch = self._attachment.batch(caches, moved=moved)
        for tape in tapes:
            tape.driver.cache = cast(StreamCache, _Lent())

    @torch.inference_mode()
    def step(self, undisturbed: bool) -> None:
        """Run the token that waits on each tape; see :meth:`Attachment.step`."""
        started = time.perf_counter()
        cache, drivers = self._batch.cache, [tape.driver for tape in self._tapes]
        ids = torch.tensor([tape.queue for tape in self._tapes], device=drivers[0].device)
        logits = self._attachment.step(cache, ids, undisturbed=undisturbed)
        for tape in self._tapes:
            tape.queue = []
        cache.after_forward(ids, None)
        with _noted_by_all(drivers, [*ids], [*logits], seconds=time.perf_counter() - started):
            pass

    def keep(self, tapes: list[Tape]) -> None:
        """Give the others their streams back."""
        rows = [row for row, tape in enumerate(self._tapes) if tape in tapes]
        if len(rows) == len(self._tapes):
            return
        for row, tape in enumerate(self._tapes):
            if row not in rows:
                tape.driver.cache = self._batch.take(row)
        self._tapes = [self._tapes[row] for row in rows]
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
def rows_of(tapes: list[Tape], *, moved: bool) -> Generator[BatchRows | PackedRows, None, None]:
    """Put streams together for as long as the block lasts."""
    rows: BatchRows | PackedRows | None = None
    tapes = sorted(tapes, key=_memory)
    try:
        with deferred_interrupt():
            rows = PackedRows(tapes) if _are_apart(tapes) else BatchRows(tapes, moved=moved)
        yield rows
    finally:
        if rows is not None:
            with deferred_interrupt():
                rows.keep([])


def _memory(tape: Tape) -> str:
    """Return what a stream's forwards use, to put those side by side that use the same."""
    return tape.driver.cache.adapter or ""


def _group(tape: Tape) -> str | None:
    """Return what streams have in common that run in one forward."""
    return tape.driver.attachment.adapters.group(tape.driver.cache.adapter)


def _are_apart(tapes: list[Tape]) -> bool:
    if len(tapes) == 1:
        return True
    return tapes[0].driver.attachment.why_apart([tape.driver.cache for tape in tapes]) is not None
