"""The page of who found what: whole by itself, readable in the dark, and all its numbers in it."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from everlong.errors import InputError
from everlong.evaluation.finding import Found, shares
from everlong.evaluation.finding_pictures import draw_bars, draw_heat, short
from everlong.evaluation.finding_report import FindingReport, page, save_html, tables
from everlong.evaluation.long_inputs import Answer
from everlong.evaluation.resources import describe_machine, machine_line

VOID = {"meta", "img", "source"}
WAYS = ("stock", "last", "<recall>")


def found(way: str, task: str, length: int, sample: int, told: float, depth: float | None) -> Found:
    held = {"window": 5_000_000} if way != "<recall>" else {"window": 1_500_000, "ram": 7_000_000}
    given = Answer(f"wrote <b>{told}</b> & more", 4096, 1024, 77, held, 2.0, 12.34)
    return Found(way, task, length, sample, depth, told == 1, told, given, ("a<b",), way == "<recall>")


@pytest.fixture(scope="module")
def report() -> FindingReport:
    every = [
        found(way, task, length, sample, (sample + at) / 4, depth=None if task == "vt" else sample / 2)
        for task in ("passkey of 7 digits", "vt")
        for length in (4096, 8000)
        for at, way in enumerate(WAYS)
        for sample in range(3)
    ]
    settings = {"window": 2048}
    return FindingReport(
        "tiny & <small>", tuple(every), (describe_machine(),), settings, {"h2o": "too <dry>"}
    )


class Reader(HTMLParser):
    """Notes what stands in a page, and whether each tag that is opened is closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.said = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said += data


def test_the_page_is_whole_and_asks_no_server(report: FindingReport) -> None:
    text = page(report)
    reader = Reader(text)
    assert text.startswith("<!DOCTYPE html>") and not reader.open
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|<link", re.sub(r"base64,[^\"]*", "", text))
    assert len(reader.addresses) == 4  # bars, and the map of the one task that has depths; light and dark
    for address in reader.addresses:
        kind, data = address.split(",")
        assert kind == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")
    assert text.count('alt="') == 2 and "prefers-color-scheme: dark" in text


def test_the_page_shows_each_number_and_says_what_it_is_of(report: FindingReport) -> None:
    said = Reader(page(report)).said
    for word in ("tiny & <small>", "window=2048", "passkey of 7 digits, 8,000 tokens", "h2o: too <dry>"):
        assert word in said
    assert machine_line(report.machines[0]) in said
    for word in ("held: window", "held: ram", "query-aware", "2.0", "2,048", "1,024", "12.3", "7.0 MB"):
        assert word in said
    assert "wrote <b>0.5</b> & more" in said and "a<b" in said


def test_tables_have_a_row_for_each_way_and_mark_what_knew_the_question(report: FindingReport) -> None:
    target = io.StringIO()
    Console(file=target, width=160).print(tables(report.found))
    text = target.getvalue()
    assert text.count("<recall>*") == 4 and "* knew the question" in text and text.count("stock") == 4
    assert [text.index(f"{task}, {n:,} tokens") > 0 for task in ("vt",) for n in (4096, 8000)]
    (row,) = [line.split() for line in text.split("vt, 8,000 tokens")[1].splitlines() if "last" in line]
    assert row[1:4] == ["0%", "50%", "13%-87%"]


def test_what_people_name_is_shown_as_it_is(report: FindingReport, tmp_path: Path) -> None:
    """A needle may hold what rich takes for markup, and matplotlib for a formula."""
    name = r"niah: keep [/b] it, for $5 \foo and $6"
    odd = dataclasses.replace(report, found=tuple(dataclasses.replace(f, task=name) for f in report.found))
    target = io.StringIO()
    Console(file=target, width=160).print(tables(odd.found))
    assert name in target.getvalue()
    save_html(odd, tmp_path / "page.html")
    assert "keep [/b] it" in (tmp_path / "page.html").read_text()


def test_numbers_are_whole_in_eighty_columns(report: FindingReport) -> None:
    target = io.StringIO()
    Console(file=target, width=80).print(tables(report.found))
    assert "…" not in target.getvalue()


def test_json_holds_every_text(report: FindingReport) -> None:
    plain: dict[str, Any] = report.as_json()
    assert len(plain["texts"]) == 36 and plain["machine"] == report.machines[0]
    assert Found.restored(plain["texts"][5]) == report.found[5]


def test_a_report_of_nothing_yet_is_a_page(tmp_path: Path) -> None:
    empty = FindingReport("tiny", (), (describe_machine(),))
    save_html(empty, tmp_path / "new" / "page.html")
    assert not Reader((tmp_path / "new" / "page.html").read_text()).open
    with pytest.raises(InputError, match="cannot write"):
        save_html(empty, tmp_path / "new" / "page.html" / "below.html")


def pixels(png: bytes) -> Any:
    return matplotlib.image.imread(io.BytesIO(png))


def test_pictures_are_clear_behind_and_follow_what_was_told(report: FindingReport) -> None:
    some = [one for one in report.found if one.task.startswith("passkey")]
    heat = pixels(draw_heat(some, dark=False))
    assert heat[0, 0, 3] == 0 and not np.array_equal(heat, pixels(draw_heat(some, dark=True)))
    # what is told whole is yellow, what is not told at all is dark blue
    yellow = (abs(heat[..., :3] - [0.993, 0.906, 0.144]) < 0.02).all(-1) & (heat[..., 3] > 0.99)
    violet = (abs(heat[..., :3] - [0.267, 0.005, 0.329]) < 0.02).all(-1) & (heat[..., 3] > 0.99)
    assert yellow.sum() > 100 and violet.sum() > 100
    bars = pixels(draw_bars(shares(report.found), dark=True))
    assert bars[0, 0, 3] == 0 and bars.shape[0] > 100


def test_a_map_shows_what_there_is_when_texts_are_missing(report: FindingReport) -> None:
    assert draw_heat(report.found[:1], dark=False) and draw_heat(report.found[:8], dark=True)


def test_lengths_are_written_as_people_do() -> None:
    assert [short(length) for length in (4096, 131072, 900)] == ["4k", "128k", "900"]
