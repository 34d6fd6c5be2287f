"""Perplexity by position, of each way to read a text whole: a section of the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from everlong.errors import ConfigurationError
from everlong.evaluation.comparison import STOCK, Method, MethodResult, Plan, compare_methods
from everlong.evaluation.finding import way_key
from everlong.evaluation.line_pictures import Line, Panel, draw_lines
from everlong.evaluation.long_inputs import Way, seen_at_most, whole_readers
from everlong.evaluation.measures import Measure, OnStep, Picture, Section, Step, Table
from everlong.evaluation.texts import LIBRARY, Excerpt, check_text, enough_text, text_key
from everlong.models.files import human_bytes
from everlong.models.loading import LoadedModel
from everlong.reading.reports import Progress

_AHEAD = "*"
_MUCH = 3.0  # times stock's perplexity: heights go by powers of ten
_NOTE = (
    "Each method reads the first {tokens:,} tokens of {text}, {chunk} at a time; lower is better. A token is "
    "predicted from what the method still sees of those before it. A method that is query-aware chooses what "
    "to keep when a text ends, and reads it as stock does."
)
_WHY_AHEAD = (
    f"{_AHEAD} a little too good: queries of a group recall together, so earlier ones gain from later ones."
)


@dataclass(frozen=True)
class PerplexityByPosition(Measure):
    """How well each way to read predicts a text, by how much of it was read before.

    Parameters
    ----------
    tokens : int
        Of the text, from its beginning.
    text : str
        A file, or ``"library"``: Python's own sources.
    width : int or None
        Positions of one column; None: an eighth of the text.
    chunk : int
        Tokens of one forward.
    """

    name: ClassVar[str] = "perplexity"

    tokens: int
    text: str = LIBRARY
    width: int | None = None
    chunk: int = 512

    def __post_init__(self) -> None:
        for name in ("tokens", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.width is not None and self.width < 1:
            raise ConfigurationError(f"width must be at least 1, not {self.width}")
        check_text(self.text)

    def steps(self, loaded: LoadedModel, ways: Sequence[Way]) -> list[Step]:
        """Return one for each way that reads a text whole."""
        excerpt = enough_text(loaded.tokenizer, self.text, self.tokens)
        width = self.width or math.ceil(self.tokens / 8)
        which = f"{text_key(excerpt, self.tokens)}, {self.tokens} tokens by {width}"
        return [
            Step(
                f"perplexity; {way_key(way, self.chunk)}; {which}",
                f"{way.name}: perplexity of {self.tokens:,} tokens",
                self.tokens,
                lambda on_step, way=way: self._read(loaded, way, excerpt, width, on_step),  # type: ignore[misc]
            )
            for way in whole_readers(ways, self.name)
        ]

    def _read(
        self, loaded: LoadedModel, way: Way, excerpt: Excerpt, width: int, on_step: OnStep
    ) -> dict[str, Any]:
        def told(_: str, at: Progress) -> None:
            on_step(at.tokens / self.tokens, f"perplexity {at.perplexity:,.1f}" if at.perplexity else "")

        found = compare_methods(
            loaded,
            [Method(way.name, way.policy, 0, way.tier)],
            excerpt.ids,
            text=excerpt.name,
            plan=Plan(self.chunk, width),
            progress=told,
        )
        return {
            "result": found.results[0].as_json(),
            "is_query_aware": way.is_query_aware,
            "text": found.text,
            "training_length": found.training_length,
        }

    def section(self, rows: Sequence[dict[str, Any]]) -> Section:
        """Return perplexities by position, a row for each way, and what reading took."""
        results = [MethodResult.restored(row["result"]) for row in rows]
        names = [result.name + (_AHEAD if result.looks_ahead else "") for result in results]
        places = [f"{bucket.start:,}-{bucket.stop:,}" for bucket in results[0].buckets]
        note = _NOTE.format(tokens=self.tokens, text=rows[0]["text"], chunk=self.chunk)
        length = rows[0]["training_length"]
        if length is not None and length < self.tokens:
            note += f" The model was trained on {length:,} tokens."
        is_ahead = any(result.looks_ahead for result in results)
        told = "perplexity by position"
        tables = (
            Table(
                told,
                ("", *places),
                tuple(
                    (name, *(_number(bucket.perplexity) for bucket in result.buckets))
                    for name, result in zip(names, results, strict=True)
                ),
            ),
            *_in_times_of_stock(names, places, results),
            Table(
                "Intervals of 95 %, of each by itself: differences on the same text are surer",
                ("", *places),
                tuple(
                    (name, *(f"{_number(b.low)}-{_number(b.high)}" for b in result.buckets))
                    for name, result in zip(names, results, strict=True)
                ),
                is_detail=True,
            ),
            _costs(names, results, [row["is_query_aware"] for row in rows]),
        )
        mark = length if length is not None and length < self.tokens else None
        panels = _panels(names, results, mark)
        picture = Picture(lambda dark: draw_lines(panels, dark=dark), told)
        remark = _WHY_AHEAD if is_ahead else ""
        title = "Perplexity by position"
        return Section(self.name, title, note, tables, (picture,), list(rows), remark)


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "∞"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def _ratios(result: MethodResult, results: Sequence[MethodResult]) -> list[float] | None:
    """Return a method's perplexities in times of stock's; None: stock was not measured."""
    stock = next((one for one in results if one.name == STOCK), None)
    if stock is None:
        return None
    pairs = zip(result.buckets, stock.buckets, strict=True)
    return [ours.perplexity / theirs.perplexity for ours, theirs in pairs]


def _in_times_of_stock(
    names: Sequence[str], places: Sequence[str], results: Sequence[MethodResult]
) -> list[Table]:
    rows = []
    for name, result in zip(names, results, strict=True):
        if (ratios := _ratios(result, results)) is not None and result.name != STOCK:
            rows.append((name, *(f"{ratio:,.3f}" if math.isfinite(ratio) else "" for ratio in ratios)))
    return [Table("in times of stock's", ("", *places), tuple(rows), is_wide=True)] if rows else []


def _panels(names: Sequence[str], results: Sequence[MethodResult], mark: float | None) -> list[Panel]:
    """Return perplexities over position, and how they stand to stock's, where the text matters less."""
    lines, relative = [], []
    for name, result in zip(names, results, strict=True):
        lines.append(_line(name, result, [bucket.perplexity for bucket in result.buckets]))
        if (ratios := _ratios(result, results)) is not None:
            relative.append(_line(name, result, ratios))
    where = "position in the text, tokens"
    panel = Panel("perplexity", where, tuple(lines), True, mark=mark, mark_name="training length")
    if len(relative) < 2:
        return [panel]
    is_log = max(max(line.y, default=1.0) for line in relative) > _MUCH
    beside = Panel("in times of stock's", where, tuple(relative), is_log, False, mark=mark)
    return [panel, beside]


def _line(name: str, result: MethodResult, values: Sequence[float]) -> Line:
    finite = [pair for pair in zip(result.buckets, values, strict=True) if math.isfinite(pair[1])]
    middles = tuple((bucket.start + bucket.stop) / 2 for bucket, _ in finite)
    return Line(name, middles, tuple(value for _, value in finite))


def _costs(names: Sequence[str], results: Sequence[MethodResult], aware: Sequence[bool]) -> Table:
    """Return what reading took, as every row of a report has it."""
    tiers = list(dict.fromkeys(tier for result in results for tier in result.bytes))
    rows = []
    for name, result, is_aware in zip(names, results, aware, strict=True):
        read = sum(chunk.tokens for chunk in result.chunks)
        rows.append(
            (
                name,
                f"{read:,}",
                f"{seen_at_most(read, result.options):,}",
                f"{result.forgotten:,}",
                f"{sum(chunk.seconds for chunk in result.chunks):,.1f}",
                f"{result.tokens_per_second:,.0f}",
                *(human_bytes(result.bytes[tier]) if tier in result.bytes else "" for tier in tiers),
                "yes" if is_aware else "no",
            )
        )
    headings = ("", "read", "seen", "lost", "seconds", "tokens/s", *(f"held: {tier}" for tier in tiers))
    title = "what reading took; scoring is not counted"
    return Table(title, (*headings, "query-aware"), tuple(rows), is_wide=True)
