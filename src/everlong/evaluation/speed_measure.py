"""How fast each way reads and writes, by the length of the text: a section of the report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

import torch
from torch import Tensor

from everlong.errors import ConfigurationError
from everlong.evaluation.finding import way_key
from everlong.evaluation.line_pictures import Line, Panel, draw_lines
from everlong.evaluation.long_inputs import Way, seen_at_most, whole_readers
from everlong.evaluation.measures import Measure, OnStep, Picture, Section, Step, Table
from everlong.evaluation.perplexity import read_on, write_on
from everlong.evaluation.resources import machine_key
from everlong.evaluation.speed import BLOCK, decode_seconds, step_seconds, wait_for
from everlong.evaluation.streams import Stream, open_stream
from everlong.evaluation.texts import LIBRARY, Excerpt, check_lengths, check_text, enough_text, text_key
from everlong.models.files import human_bytes
from everlong.models.head import Head
from everlong.models.loading import LoadedModel

_WRITING = 8  # tokens read in the time that one is written, about
_LAST = 4  # chunks whose median is the rate at the end
_NOTE = (
    "Each method reads the beginning of {text}, {chunk} tokens at a time, and then writes {steps} tokens: "
    "means of these less the first, the head included, in whole cycles, so that what a method looks up every "
    "few tokens counts. At the end is the median rate of the last chunks, up to four. A "
    "chunk is read beforehand, to warm up. Each row was measured once, by itself, with the weights as they "
    "were loaded: nothing else should have been running. everlong bench speed measures one method against "
    "stock in turn, with packed weights. Methods that cut a text to the window read as stock does at that "
    "length."
)


@dataclass(frozen=True)
class Pace:
    """How fast one way to read is at one length.

    Attributes
    ----------
    way : str
        How it was read.
    length : int
        Tokens of the text.
    seconds : float
        To read all of them, and to choose what to keep, where a method does that at the end.
    tokens_per_second, last_tokens_per_second : float
        Read, of the whole text, with that choice, and of the last chunks, without it.
    decode_ms : float
        Milliseconds to write a token behind it, as of :func:`~everlong.evaluation.speed.step_seconds`.
    seen, forgotten : int
        Keys that a token sees at most; tokens lost for good, once the text was read.
    bytes : dict of str to int
        Held then, by tier.
    is_query_aware : bool
        Whether the method chooses what it keeps when the text ends.
    """

    way: str
    length: int
    seconds: float
    tokens_per_second: float
    last_tokens_per_second: float
    decode_ms: float
    seen: int
    forgotten: int
    bytes: dict[str, int]
    is_query_aware: bool


@dataclass(frozen=True)
class SpeedByLength(Measure):
    """How fast each way to read is, at several lengths.

    Parameters
    ----------
    lengths : tuple of int
        Tokens of the texts.
    text : str
        A file, or ``"library"``: Python's own sources.
    chunk, written : int
        Tokens of one forward; tokens written after the text, the first of which is not counted.
    """

    name: ClassVar[str] = "speed"

    lengths: tuple[int, ...]
    text: str = LIBRARY
    chunk: int = 512
    written: int = 2 * BLOCK + 1

    def __post_init__(self) -> None:
        check_lengths(self.lengths)
        for name in ("chunk", "written"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, not {getattr(self, name)}")
        check_text(self.text)

    def steps(self, loaded: LoadedModel, ways: Sequence[Way]) -> list[Step]:
        """Return one for each length and each way that reads a text whole; shorter ones first."""
        excerpt = enough_text(loaded.tokenizer, self.text, max(self.lengths) + self.written)
        some = whole_readers(ways, self.name)
        return [
            Step(
                f"speed; {way_key(way, self.chunk)}; {text_key(excerpt, length + self.written)}, "
                f"{length} tokens + {self.written}; machine [{machine_key()}]",
                f"{way.name}: speed at {length:,} tokens",
                length + self.chunk + _WRITING * self.written,
                lambda on_step, way=way, length=length: dataclasses.asdict(  # type: ignore[misc]
                    self._timed(loaded, way, length, excerpt, on_step)
                ),
            )
            for length in sorted(self.lengths)
            for way in some
        ]

    @torch.inference_mode()
    def _timed(self, loaded: LoadedModel, way: Way, length: int, excerpt: Excerpt, on_step: OnStep) -> Pace:
        head = Head(loaded.model)
        ids = excerpt.ids.to(head.weight.device)
        with open_stream(loaded.model, way.policy, tier=way.tier) as stream:
            read_on(stream, head, ids[: min(self.chunk, length)], None)
        with open_stream(loaded.model, way.policy, tier=way.tier) as stream:
            hidden: Tensor | None = None
            seconds, rates = 0.0, list[float]()
            for piece in torch.split(ids[:length], self.chunk):
                begun = time.perf_counter()
                hidden = read_on(stream, head, piece, hidden)
                wait_for(hidden)
                spent = time.perf_counter() - begun
                seconds += spent
                if len(piece) == self.chunk or not rates:
                    rates.append(len(piece) / spent)
                on_step(stream.seen / length, f"{rates[-1]:,.0f} tokens/s")
            assert hidden is not None
            begun = time.perf_counter()
            stream.end_reading()
            wait_for(hidden)
            seconds += time.perf_counter() - begun
            forgotten, held = stream.forgotten, stream.bytes()
            written = ids[length : length + self.written]
            steps = _write(loaded, stream, head, written, hidden)
            return Pace(
                way.name,
                length,
                seconds,
                length / seconds,
                median(rates[-_LAST:]),
                1000 * step_seconds(steps),
                seen_at_most(length, stream.described()[1]),
                forgotten,
                held,
                way.is_query_aware,
            )

    def section(self, rows: Sequence[dict[str, Any]]) -> Section:
        """Return rates by length, a row for each way, and what was held."""
        every = [Pace(**row) for row in rows]
        lengths = tuple(sorted({pace.length for pace in every}))
        panels = [
            Panel(title, "tokens of the text", tuple(_lines(every, value)), ticks=lengths)
            for title, value in (
                ("reading: tokens/s where the text ends", "last_tokens_per_second"),
                ("writing: ms a token", "decode_ms"),
            )
        ]
        told = "Reading and writing, by length"
        text = "Python's own sources" if self.text == LIBRARY else self.text
        note = _NOTE.format(text=text, chunk=self.chunk, steps=self.written)
        tables = tuple(
            table
            for length in lengths
            for table in _tables(length, [pace for pace in every if pace.length == length])
        )
        picture = Picture(lambda dark: draw_lines(panels, dark=dark), told)
        pictures = (picture,) if len(lengths) > 1 else ()  # of one length, the table says it all
        return Section(self.name, "Speed by length", note, tables, pictures, list(rows))


def _write(loaded: LoadedModel, stream: Stream, head: Head, ids: Tensor, hidden: Tensor) -> list[float]:
    """Return the seconds of each token that is written, the first behind a text left out where it can be."""
    if not stream.wants_surprisal:
        model: Any = loaded.model
        spent = decode_seconds(stream, ids, model.get_output_embeddings())
    else:
        spent, logits = [], head.logits(hidden)
        for token in ids:
            begun = time.perf_counter()
            logits = head.logits(write_on(stream, token[None], logits))
            wait_for(logits)
            spent.append(time.perf_counter() - begun)
    return spent[1:] or spent


def _lines(every: Sequence[Pace], value: str) -> list[Line]:
    lines = []
    for way in dict.fromkeys(pace.way for pace in every):
        some = [pace for pace in every if pace.way == way]
        heights = tuple(getattr(pace, value) for pace in some)
        lines.append(Line(way, tuple(pace.length for pace in some), heights))
    return lines


def _tables(length: int, some: Sequence[Pace]) -> tuple[Table, Table]:
    tiers = list(dict.fromkeys(tier for pace in some for tier in pace.bytes))
    rates = tuple(
        (
            pace.way,
            f"{pace.tokens_per_second:,.0f}",
            f"{pace.last_tokens_per_second:,.0f}",
            f"{pace.decode_ms:,.1f}",
            f"{pace.seconds:,.1f}",
            human_bytes(sum(pace.bytes.values())),
        )
        for pace in some
    )
    held = tuple(
        (
            pace.way,
            f"{pace.length:,}",
            f"{pace.seen:,}",
            f"{pace.forgotten:,}",
            *(human_bytes(pace.bytes[tier]) if tier in pace.bytes else "" for tier in tiers),
            "yes" if pace.is_query_aware else "no",
        )
        for pace in some
    )
    title, after = f"speed, {length:,} tokens", f"what is held after {length:,} tokens"
    held_in = (f"held: {tier}" for tier in tiers)
    return (
        Table(title, ("", "tokens/s", "at the end", "ms/token", "seconds", "held"), rates),
        Table(after, ("", "read", "seen", "lost", *held_in, "query-aware"), held, is_wide=True),
    )
