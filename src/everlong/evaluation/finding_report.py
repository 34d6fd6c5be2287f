"""Who found what, as tables for the terminal and as a page that holds all it shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from everlong.errors import InputError
from everlong.evaluation.finding import Found, FoundShare, shares
from everlong.evaluation.finding_pictures import draw_bars, draw_heat
from everlong.evaluation.measures import Section
from everlong.evaluation.page_parts import (
    html_details,
    html_page,
    html_picture,
    html_section,
    html_table,
    terminal_table,
)
from everlong.evaluation.resources import machine_line
from everlong.models.files import human_bytes

_SHOWN = 200  # characters of an answer

_AWARE = "*"
_NOTE = (
    "Every method reads the same texts, and the question only after them. Told is the mean share of what "
    "was asked for that the answer holds, and of a passkey the share of its digits before the first mistake; "
    "found are texts of which all was told. Intervals are of 95 % (Wilson's score). last and first-and-last "
    "are the stock model, the text cut to the window. Seen are the keys that a token sees at most, lost the "
    "tokens that nothing can bring back. A method that is query-aware chooses what to keep by the question, "
    "and would have to read the text anew for another."
)


@dataclass(frozen=True)
class FindingReport:
    """What ways to read found.

    Attributes
    ----------
    model : str
        Which model read.
    found : tuple of Found
        What became of each text.
    machines : tuple of dict
        What it was measured on; several where it was interrupted and taken up elsewhere.
    settings : dict
        Options that all methods were given.
    left_out : dict of str to str
        Methods that cannot run here, and why.
    sections : tuple of Section
        What else was measured.
    """

    model: str
    found: tuple[Found, ...]
    machines: tuple[dict[str, Any], ...]
    settings: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    sections: tuple[Section, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "model": self.model,
            "machine": self.machines[-1],
            "machines": list(self.machines),
            "settings": self.settings,
            "left_out": self.left_out,
            "texts": [one.as_json() for one in self.found],
            **{section.name: section.values for section in self.sections},
        }


_COLUMNS: tuple[tuple[str, Callable[[FoundShare], str]], ...] = (
    ("found", lambda share: f"{share.found.mean:.0%}"),
    ("told", lambda share: f"{share.told.mean:.0%}"),
    ("95 %", lambda share: f"{share.told.low:.0%}-{share.told.high:.0%}"),
    ("read", lambda share: f"{share.read:,}"),
    ("seen", lambda share: f"{share.seen:,}"),
    ("lost", lambda share: f"{share.forgotten:,}"),
    ("held", lambda share: human_bytes(sum(share.bytes.values()))),
    ("tokens/s", lambda share: f"{share.tokens_per_second:,.0f}"),
    ("ms/token", lambda share: f"{share.decode_ms:,.1f}"),
)


def tables(found: Sequence[Found]) -> Group:
    """Return a rich table for each kind of texts and length, a row for each way to read."""
    shown: list[Table | Text] = []
    columns = [column for column in _COLUMNS if column[0] != "read"]  # the page has it; 80 columns do not
    for title, some in _by_kind(shares(found)).items():
        table = terminal_table(title)
        for heading in ("", *(heading for heading, _ in columns)):
            table.add_column(heading, justify="right" if heading else "left", overflow="fold")
        for share in some:
            mark = _AWARE if share.is_query_aware else ""
            table.add_row(Text(share.way + mark), *(show(share) for _, show in columns))
        shown.append(table)
    if any(one.is_query_aware for one in found):
        shown.append(Text(f"{_AWARE} knew the question when it chose what to keep", style="dim"))
    return Group(*shown)


def save_html(report: FindingReport, path: Path) -> None:
    """Write the page of a report, whole or of what there is yet.

    Raises
    ------
    InputError
        It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(report), encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}; choose another folder with --output"
        ) from error


def page(report: FindingReport) -> str:
    """Return the report as one HTML page, its pictures in it; it asks no server for anything."""
    every = shares(report.found)
    has_ways = bool(every) or not report.sections or any(section.has_ways for section in report.sections)
    what = "Methods side by side" if report.sections else "What methods find"
    if not has_ways:
        what = ", ".join(section.title for section in report.sections)
    title = f"{what}: {report.model}"
    settings = ", ".join(f"{name}={value}" for name, value in report.settings.items()) or "none"
    body = [
        f"<h1>{escape(title)}</h1>",
        *([] if report.sections else [f"<p>{escape(_NOTE)}</p>"]),
        *(
            [f'<p class="dim">Options given to all methods that have them: {escape(settings)}.</p>']
            * has_ways
        ),
        *(f'<p class="dim">{escape(machine_line(machine))}</p>' for machine in report.machines),
    ]
    if report.left_out:
        body += ["<h2>Methods that cannot run here</h2>", "<ul>"]
        body += [f"<li>{escape(name)}: {escape(why)}</li>" for name, why in report.left_out.items()]
        body += ["</ul>"]
    if every:
        body += ["<h2>Percent told</h2>", *([f"<p>{escape(_NOTE)}</p>"] if report.sections else [])]
        body += _overview(every)
        body += [
            html_picture(lambda dark: draw_bars(every, dark=dark), "Percent told, by task, method, length")
        ]
    for task in dict.fromkeys(one.task for one in report.found):
        body += _task(task, [one for one in report.found if one.task == task])
    for section in report.sections:
        body += html_section(section)
    return html_page(title, body)


def _overview(every: Sequence[FoundShare]) -> list[str]:
    kinds = list(dict.fromkeys((share.task, share.length) for share in every))
    told = {(share.way, share.task, share.length): 100 * share.told.mean for share in every}
    ways = dict.fromkeys(share.way for share in every)
    cells = [
        [way, *(f"{told[way, *kind]:.0f}" if (way, *kind) in told else "" for kind in kinds)] for way in ways
    ]
    return html_table("", ["", *(f"{task}, {length:,}" for task, length in kinds)], cells)


def _task(task: str, found: Sequence[Found]) -> list[str]:
    lines = [f"<h2>{escape(task)}</h2>"]
    if found[0].depth is not None:
        lines += [
            html_picture(
                lambda dark: draw_heat(found, dark=dark), f"{task}: percent told, by length and depth"
            )
        ]
    headings = ["", *(heading for heading, _ in _COLUMNS if heading != "held")]
    for title, some in _by_kind(shares(found)).items():
        tiers = list(dict.fromkeys(tier for share in some for tier in share.bytes))
        cells = [
            [
                share.way,
                *(show(share) for heading, show in _COLUMNS if heading != "held"),
                f"{share.seconds:,.1f}",
                *(human_bytes(share.bytes[tier]) if tier in share.bytes else "" for tier in tiers),
                "yes" if share.is_query_aware else "no",
            ]
            for share in some
        ]
        lines += html_table(
            title, [*headings, "seconds", *(f"held: {tier}" for tier in tiers), "query-aware"], cells
        )
    answers = [
        [
            one.way,
            f"{one.length:,}",
            "" if one.depth is None else f"{one.depth:.0%}",
            f"{one.told:.0%}",
            ", ".join(one.expected),
            one.answer.text[:_SHOWN],
        ]
        for one in found
    ]
    headings = ["", "tokens", "depth", "told", "asked for", "written"]
    return [
        *lines,
        *html_details("Every answer", html_table("", headings, answers, 4)),
    ]


def _by_kind(every: Sequence[FoundShare]) -> dict[str, list[FoundShare]]:
    kinds: dict[str, list[FoundShare]] = {}
    for share in every:
        kinds.setdefault(f"{share.task}, {share.length:,} tokens", []).append(share)
    return kinds
