"""A comparison as a table, as JSON and as a picture: all three show its numbers."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from everlong.errors import InputError
from everlong.evaluation import report
from everlong.evaluation.comparison import Comparison, MethodResult, Plan
from everlong.evaluation.perplexity import Bucket, Chunk
from everlong.evaluation.picture import draw
from everlong.evaluation.resources import describe_machine, machine_line


def result(name: str, perplexities: list[float], **fields: Any) -> MethodResult:
    buckets = tuple(
        Bucket(100 * i, 100 * (i + 1), 100, value, 0.9 * value, 1.1 * value)
        for i, value in enumerate(perplexities)
    )
    chunks = tuple(Chunk(50 * (i + 1), 50, 0.25 * (i + 1), 1000 * (i + 1)) for i in range(6))
    plain = MethodResult(
        name, name, {"window": 2048}, buckets, chunks, 12.34, "", {"window": 5_000_000}, 300, 200, 100
    )
    return dataclasses.replace(plain, **fields)


@pytest.fixture
def comparison() -> Comparison:
    results = (
        result("stock", [20.123, 30.2, 6543.2], policy=None, options={}, decode_ms=math.nan, forgotten=0),
        result("lm-infinite", [21.0, 123.46, 3000.0], bytes={"window": 1500, "ram": 500}),
        result("streaming-llm", [19.0, 60.5, math.inf]),
    )
    return Comparison("a model", "a text", 300, Plan(50, 100), 100, results, describe_machine())


def shown(comparison: Comparison, *, colour: bool = False) -> list[str]:
    target = io.StringIO()
    system: Any = "standard" if colour else None
    console = Console(file=target, width=240, force_terminal=colour, color_system=system)
    console.print(report.table(comparison))
    return target.getvalue().splitlines()


def cells(lines: list[str], start: str) -> list[str]:
    (line,) = [line.strip() for line in lines if line.strip().startswith(start)]
    return re.split(r"\s{2,}", line[len(start) :].strip())


# --- the table ----------------------------------------------------------------------------------------


def test_a_row_for_each_bucket_and_a_column_for_each_method(comparison: Comparison) -> None:
    lines = shown(comparison)
    assert lines[0].split() == ["stock", "lm-infinite", "streaming-llm"]
    assert " ".join(cells(lines, "perplexity of tokens")) == "no window window 2,048 window 2,048"
    assert cells(lines, "0 to 100") == ["20.12", "21.00", "19.00"]
    assert cells(lines, "100 to 200") == ["30.20", "123.5", "60.50"]
    assert cells(lines, "200 to 300") == ["6,543", "3,000", "∞"]


def test_perplexities_that_are_a_little_too_good_are_marked(comparison: Comparison) -> None:
    assert not any("too good" in line for line in shown(comparison))
    marked = dataclasses.replace(comparison.results[2], name="recall", looks_ahead=True)
    lines = shown(dataclasses.replace(comparison, results=(*comparison.results[:2], marked)))
    assert lines[0].split() == ["stock", "lm-infinite", "recall*"]
    assert lines[-2].startswith("* a little too good") and "recall together" in lines[-2]


def test_what_it_cost_stands_below(comparison: Comparison) -> None:
    lines = shown(comparison)
    assert cells(lines, "reading, tokens/s") == ["57", "57", "57"]  # 300 tokens in 5.25 seconds
    assert cells(lines, "at the end") == ["45", "45", "45"]  # the median of 67, 50, 40 and 33
    assert cells(lines, "writing, ms/token") == ["12.3", "12.3"]  # stock wrote nothing
    assert cells(lines, "state held") == ["5.0 MB", "2.0 kB", "5.0 MB"]
    assert cells(lines, "tokens kept") == ["200", "200", "200"]
    assert cells(lines, "tokens forgotten") == ["0", "100", "100"]
    assert f"a model; {machine_line(comparison.machine)}" in " ".join(lines)
    lines = shown(dataclasses.replace(comparison, pinned=1234))
    assert f"a model; 1,234 tokens pinned; {machine_line(comparison.machine)}" in " ".join(lines)


@pytest.mark.parametrize(
    ("length", "pinned", "row"),
    [
        (50, 0, 2),
        (100, 0, 2),
        (101, 0, 3),
        (101, 1, 2),
        (200, 0, 3),
        (201, 0, None),
        (201, 1, 3),
        (201, 300, 1),
        (None, 1, None),
    ],
)
def test_a_line_marks_where_the_training_length_is_passed(
    comparison: Comparison, length: int | None, pinned: int, row: int | None
) -> None:
    lines = shown(dataclasses.replace(comparison, training_length=length, pinned=pinned))
    marks = [line.strip() for line in lines if "past training" in line]
    if row is None:
        assert marks == []
        return
    assert marks == [f"past training ({length})"]
    before = [" to " in line for line in lines[: [line.strip() for line in lines].index(marks[0])]]
    assert sum(before) == row - 1


def test_a_perplexity_more_than_twice_the_best_is_red(comparison: Comparison) -> None:
    rows = [line for line in shown(comparison, colour=True) if " to " in line]
    red = [re.findall(r"\x1b\[1;31m([^\x1b]+)", row) for row in rows]
    assert red == [[], ["123.5", "60.50"], ["6,543", "∞"]]


# --- files --------------------------------------------------------------------------------------------


def test_json_holds_the_comparison(comparison: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "new" / "compare.json"
    report.save_json(comparison, path)
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved == json.loads(json.dumps(comparison.as_json()))
    assert saved["results"][2]["buckets"][2]["perplexity"] is None  # not finite
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()


def test_the_picture_shows_each_methods_numbers(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    savefig = Figure.savefig

    def watched(self: Figure, *arguments: Any, **options: Any) -> None:
        drawn.append(self)
        savefig(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", watched)
    path = tmp_path / "new" / "compare.png"
    report.save_png(comparison, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    perplexity, speed, held = drawn[0].axes
    lines = [{line.get_label(): line for line in perplexity.get_lines()}[r.name] for r in comparison.results]
    for line, result in zip(lines, comparison.results, strict=True):
        assert list(line.get_xdata()) == [50, 150, 250]
        assert list(line.get_ydata()) == [bucket.perplexity for bucket in result.buckets]
    assert len({line.get_color() for line in lines}) == 3
    for panel, value in ((speed, lambda c: c.tokens / c.seconds), (held, lambda c: c.bytes / 2**20)):
        for line, result in zip(panel.get_lines()[:3], comparison.results, strict=True):
            assert list(line.get_xdata()) == [50, 100, 150, 200, 250, 300]
            assert list(line.get_ydata()) == [value(chunk) for chunk in result.chunks]
    assert drawn[0].get_suptitle() == "a model reads a text"


@pytest.mark.parametrize(
    ("length", "pinned", "is_marked"),
    [(100, 0, True), (350, 250, True), (300, 0, False), (350, 50, False), (None, 50, False)],
)
def test_the_picture_marks_a_training_length_that_the_text_passes(
    comparison: Comparison, length: int | None, pinned: int, is_marked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    draw(dataclasses.replace(comparison, training_length=length, pinned=pinned))
    for panel in drawn[0].axes:
        assert [text.get_text() for text in panel.texts] == ["training length"] * is_marked
        at = [line.get_xdata()[0] for line in panel.get_lines()[3:]]
        assert at == [100] * is_marked


@pytest.mark.parametrize("perplexities", [[20.0], [20.0, math.inf, 30.0]])
def test_a_picture_is_drawn_of_whatever_was_found(perplexities: list[float], comparison: Comparison) -> None:
    odd = result("odd", perplexities)
    unbounded = tuple(dataclasses.replace(bucket, low=0.0, high=math.inf) for bucket in odd.buckets)
    results = (dataclasses.replace(odd, buckets=unbounded),) * 9  # more than there are colours
    assert draw(dataclasses.replace(comparison, results=results)).startswith(b"\x89PNG\r\n")


def test_where_nothing_can_be_written_another_folder_is_asked_for(
    comparison: Comparison, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for save in (report.save_json, report.save_png):
        for path in (tmp_path / "file" / "compare", tmp_path):
            with pytest.raises(InputError, match=r"cannot write .*; choose another folder with --output"):
                save(comparison, path)
