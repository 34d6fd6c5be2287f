"""What a report measures beside what is found: each number is that of the slow way, each row is kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from everlong.errors import ConfigurationError, InputError
from everlong.evaluation import (
    line_pictures,
    long_inputs,
    resources,
    speed_measure,
)
from everlong.evaluation.comparison import MethodResult
from everlong.evaluation.kept import KeptRows
from everlong.evaluation.line_pictures import Line, Panel, draw_lines
from everlong.evaluation.measures import Picture, Section, Table, left
from everlong.evaluation.needles import passkey
from everlong.evaluation.page_parts import html_section
from everlong.evaluation.perplexity import read_on
from everlong.evaluation.perplexity_measure import PerplexityByPosition
from everlong.evaluation.resources import describe_machine
from everlong.evaluation.speed_measure import SpeedByLength
from everlong.evaluation.streams import PolicyStream, open_stream
from everlong.evaluation.texts import haystack
from everlong.models.head import Head
from everlong.models.loading import LoadedModel
from tests.evaluation.expected import Clock, perplexity_of, stock_logits, surprisal_of
from tests.evaluation.measuring import SMALL, TEXT, rows_of, said, ways

# --- perplexity ---------------------------------------------------------------------------------------


def test_perplexity_by_position_is_that_of_the_slow_way(loaded: LoadedModel, novel: str) -> None:
    measure = PerplexityByPosition(100, novel, width=40, chunk=32)
    some = ways("stock", "last", "lm-infinite", window=30, sinks=4)
    rows = rows_of(measure, loaded, *some)
    ids = haystack(loaded.tokenizer, novel, 100).ids
    slow = surprisal_of(stock_logits(loaded.model, ids), ids)
    found = [MethodResult.restored(row["result"]) for row in rows]
    assert [result.name for result in found] == ["stock", "lm-infinite"]  # what is cut has no positions
    for bucket, begin in zip(found[0].buckets, (0, 40, 80), strict=True):
        expected = perplexity_of(slow[begin : begin + 40].tolist())
        assert bucket.perplexity == pytest.approx(expected, rel=1e-4)
    table = next(t for t in measure.section(rows).tables if t.caption == "in times of stock's")
    ratio = found[1].buckets[2].perplexity / found[0].buckets[2].perplexity
    assert table.rows == (("lm-infinite", *table.rows[0][1:3], f"{ratio:,.3f}"),)
    assert "times of stock" not in said(measure.section(rows[1:]))[0]  # where stock was left out
    assert found[1].buckets[0] != found[0].buckets[0] and found[1].forgotten == 70


def test_the_section_shows_positions_costs_and_who_looks_ahead(loaded: LoadedModel, novel: str) -> None:
    measure = PerplexityByPosition(600, novel, chunk=64)
    rows = rows_of(measure, loaded, *ways("stock", "inf-llm", "snap-kv", **SMALL))
    assert [row["result"]["name"] for row in rows] == ["stock", "inf-llm"]  # snap-kv reads as stock does
    whole, terminal = said(measure.section(rows))
    for word in (
        "75-150",
        "inf-llm†",
        "novel.txt",
        "512 tokens",
        "query-aware",
        "held: ram",
        "seconds",
    ):
        assert word in whole, word
    assert "† a little too good" in terminal and "inf-llm†" in terminal and "held" not in terminal
    assert len(measure.section(rows).tables[0].rows[0]) == 9


def test_what_is_infinite_is_kept_and_shown(loaded: LoadedModel, novel: str) -> None:
    measure = PerplexityByPosition(64, novel)
    (row,) = rows_of(measure, loaded, *ways("stock"))
    row["result"]["buckets"][1] |= {"perplexity": None, "high": None}
    result = MethodResult.restored(row["result"])
    assert result.buckets[1].perplexity == math.inf and math.isnan(result.decode_ms)
    assert "∞" in said(measure.section([row]))[1]
    other = json.loads(json.dumps(row))
    other["result"]["name"], other["result"]["buckets"][1]["perplexity"] = "mine", 7.0
    ratios = next(t for t in measure.section([row, other]).tables if t.caption == "in times of stock's")
    assert ratios.rows[0][2] == "" and "0.000" not in said(measure.section([row, other]))[0]
    assert MethodResult.restored(result.as_json()).buckets == result.buckets


def test_an_estimate_of_perplexity_counts_the_head(loaded: LoadedModel, novel: str) -> None:
    (step,) = PerplexityByPosition(100, novel).steps(loaded, ways("stock"))
    rows, width = loaded.model.get_output_embeddings().weight.shape
    blocks = sum(weight.numel() for weight in loaded.model.model.layers.parameters()) + width  # last norm
    assert step.tokens == round(100 * (1 + rows * width / blocks))


# --- speed --------------------------------------------------------------------------------------------


def test_speed_is_measured_at_each_length_of_methods_that_read_the_whole(
    loaded: LoadedModel, novel: str
) -> None:
    measure = SpeedByLength((300, 150), novel, chunk=64, written=3)
    some = ways("stock", "first-and-last", "sir-llm", "inf-llm", "snap-kv", **SMALL)
    rows = rows_of(measure, loaded, *some)
    names = ["stock", "sir-llm", "inf-llm", "snap-kv"]
    assert [(row["way"], row["length"]) for row in rows] == [(n, 150) for n in names] + [
        (n, 300) for n in names
    ]
    for row in rows:
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(row["length"])
        assert row["decode_ms"] > 0 and row["last_tokens_per_second"] > 0
    assert [row["seen"] for row in rows[4:]] == [300, 60, 60, 300]
    assert [row["is_query_aware"] for row in rows[4:]] == [False, False, False, True]
    whole, terminal = said(measure.section(rows))
    assert len(measure.section(rows).pictures) == 1 and not measure.section(rows[:4]).pictures
    for word in (
        "speed, 150 tokens",
        "speed, 300 tokens",
        "held: ram",
        "query-aware",
        "novel.txt",
        "ms/token",
    ):
        assert word in whole, word
    assert terminal.count("inf-llm") == 2 and str(Path(novel).parent) not in whole


def test_bytes_are_those_of_the_stream_that_read(loaded: LoadedModel, novel: str) -> None:
    (way,) = ways("inf-llm", **SMALL)
    (row,) = rows_of(SpeedByLength((150,), novel, chunk=64, written=3), loaded, way)
    ids = haystack(loaded.tokenizer, novel, 153).ids
    with open_stream(loaded.model, way.policy) as stream:
        for piece in torch.split(ids[:150], 64):
            stream.read(piece)
        assert row["bytes"] == stream.bytes() and row["forgotten"] == stream.forgotten


def test_what_is_forgotten_after_a_text_is_not_what_writing_made_forgotten(
    loaded: LoadedModel, novel: str
) -> None:
    (way,) = ways("lm-infinite", window=60, sinks=4)
    (row,) = rows_of(SpeedByLength((150,), novel, written=30), loaded, way)
    assert row["forgotten"] == 150 - 60


def test_the_seconds_of_reading_hold_what_a_method_spends_on_choosing(
    loaded: LoadedModel, novel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, end = Clock(), PolicyStream.end_reading

    def choose(self: PolicyStream) -> None:
        clock.now += 100
        end(self)

    def read(*given: Any) -> Any:
        clock.now += 1
        return read_on(*given)

    monkeypatch.setattr(PolicyStream, "end_reading", choose)
    for module in (speed_measure, long_inputs):
        monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(module, "read_on", read)
    (way,) = ways("snap-kv", budget=40)
    (row,) = rows_of(SpeedByLength((128,), novel, chunk=64, written=2), loaded, way)
    assert row["seconds"] == 102 and row["last_tokens_per_second"] == 64
    sample = passkey(loaded.tokenizer, 900, depth=0.5)
    chunks = -(-len(sample.context) // 512) + 1
    assert long_inputs.answer(loaded, way, sample, max_new_tokens=2).seconds == 100 + chunks


def test_a_written_token_goes_through_the_head_once_and_is_told_its_surprisal(
    loaded: LoadedModel, novel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (way,) = ways("sir-llm", window=60, sinks=4)
    told, rows = list[list[float]](), list[int]()
    tell, block = PolicyStream.told, Head.block

    def telling(self: PolicyStream, ids: torch.Tensor, surprisal: torch.Tensor) -> None:
        told.append(surprisal.tolist())
        tell(self, ids, surprisal)

    def counting(self: Head, hidden: torch.Tensor, begin: int, stop: int) -> torch.Tensor:
        rows.append(len(hidden))
        return block(self, hidden, begin, stop)

    monkeypatch.setattr(PolicyStream, "told", telling)
    monkeypatch.setattr(Head, "block", counting)
    rows_of(SpeedByLength((100,), novel, chunk=100, written=5), loaded, way)
    assert rows.count(1) == 1 + 5  # of the text's last token, and of each that was written
    ids, head = haystack(loaded.tokenizer, novel, 105).ids, Head(loaded.model)
    with open_stream(loaded.model, way.policy) as stream, torch.inference_mode():
        hidden = read_on(stream, head, ids[:100], None)
        for at in range(100, 105):
            hidden = read_on(stream, head, ids[at : at + 1], hidden)
    ours, slow = told[-11:-6], told[-5:]
    assert [one[0] for one in ours] == pytest.approx([one[0] for one in slow], abs=1e-4)


def test_lookups_count_where_writing_is_timed(
    loaded: LoadedModel, novel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(stream: Any, ids: Any, head: Any) -> list[float]:
        return [100.0, *([0.001, 0.001, 0.001, 0.005] * 16)][: len(ids)]

    monkeypatch.setattr(speed_measure, "decode_seconds", seconds)
    measure = SpeedByLength((64,), novel)
    (row,) = rows_of(measure, loaded, *ways("stock"))
    assert row["decode_ms"] == pytest.approx(2)
    assert "writes 65 tokens: means of these less the first" in measure.section([row]).note


# --- rows and refusals --------------------------------------------------------------------------------


def test_rows_are_kept_and_only_what_changed_is_measured_again(
    loaded: LoadedModel, novel: str, tmp_path: Path
) -> None:
    kept = KeptRows(tmp_path / "rows.json", {})
    some = ways("stock", "lm-infinite", window=30, sinks=4)
    speed, perplexity = SpeedByLength((64,), novel), PerplexityByPosition(64, novel)
    for measure in (speed, perplexity):
        rows_of(measure, loaded, *some, kept=kept)
    again = KeptRows(tmp_path / "rows.json", {})
    assert not left([*speed.steps(loaded, some), *perplexity.steps(loaded, some)], again)
    longer = left(SpeedByLength((64, 128), novel).steps(loaded, some), again)
    assert [step.label for step in longer] == [
        "stock: speed at 128 tokens",
        "lm-infinite: speed at 128 tokens",
    ]
    (narrower,) = left(perplexity.steps(loaded, ways("stock", "lm-infinite", window=31, sinks=4)), again)
    assert narrower.label.startswith("lm-infinite")
    Path(novel).write_text(f"x{TEXT}")
    assert len(left(perplexity.steps(loaded, some), again)) == 2


def test_speed_is_measured_again_on_another_machine_and_kept_to_another_day(
    loaded: LoadedModel, novel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, measure = KeptRows(tmp_path / "rows.json", {}), SpeedByLength((64,), novel, written=3)
    rows_of(measure, loaded, *ways("stock"), kept=kept)
    machine = describe_machine()
    for other, again in (({"date": "2031-01-01"}, 0), ({"threads": 77}, 1)):
        monkeypatch.setattr(resources, "describe_machine", lambda other=other: machine | other)
        assert len(left(measure.steps(loaded, ways("stock")), kept)) == again


@pytest.mark.parametrize("measure", [PerplexityByPosition, lambda n, text: SpeedByLength((n,), text)])
def test_a_text_that_is_too_short_and_ways_that_cut_it_are_refused(
    loaded: LoadedModel, novel: str, measure: Any
) -> None:
    with pytest.raises(InputError, match=r"novel.txt has 2,\d+ tokens, fewer than the .* a longer --text"):
        measure(4000, novel).steps(loaded, ways("stock"))
    with pytest.raises(ConfigurationError, match="read a text whole.*last; name one with --methods"):
        measure(64, novel).steps(loaded, ways("last", window=30))
    with pytest.raises(InputError, match="missing.txt"):
        measure(64, "missing.txt").steps(loaded, ways("stock"))


def test_lines_are_drawn_for_many_ways_on_pages_of_either_brightness() -> None:
    lines = tuple(Line(f"<way {n}>", (1.0, 2.0), (n + 1.0, 5.0)) for n in range(17))
    panels = [
        Panel("one", "tokens", lines, is_log=True, mark=1.5, mark_name="here"),
        Panel("two", "x", lines[:1]),
    ]
    light, dark = (draw_lines(panels, dark=kind) for kind in (False, True))
    assert light.startswith(b"\x89PNG") and light != dark


def test_what_a_section_says_is_text_and_no_markup() -> None:
    wild = "<b>&amp; [red]"
    tables = tuple(Table(wild, ("", wild), ((wild, wild),), is_detail=detail) for detail in (False, True))
    picture = Picture(lambda dark: b"", f'{wild}" onload="')
    section = Section("own", wild, wild, tables, (picture,), {}, wild)
    whole, terminal = said(section)  # said fails where a tag is left open
    assert whole.count(wild) == 2 + 1 + 2 * 3 + 1 + 1 and terminal.count(wild) == 4 + 1
    assert "<b>" not in "".join(html_section(section)) and ' onload="' not in "".join(html_section(section))


def test_the_legend_names_each_line_once_as_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    original = line_pictures.as_png
    monkeypatch.setattr(line_pictures, "as_png", lambda figure: drawn.append(figure) or original(figure))
    names = ["_mine", "costs $5 or $", "plain"]
    lines = tuple(Line(name, (1.0, 2.0), (3.0, 5.0)) for name in names)
    draw_lines([Panel("one", "x", lines[:2]), Panel("two", "x", lines)], dark=False)
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == names
    one, two = drawn[0].axes
    colours = [handle.get_color() for handle in legend.get_lines()]
    assert len(set(colours)) == 3 and [line.get_color() for line in one.lines] == colours[:2]
    assert [line.get_color() for line in two.lines] == colours
