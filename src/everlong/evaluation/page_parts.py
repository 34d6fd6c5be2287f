"""What pages are made of: style, tables and pictures, and sections of measures, for the terminal too."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from html import escape

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from everlong.evaluation.measures import Section

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --page: #fff; --line: #d8d8d8; --dim: #666; --band: #f5f5f5; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --page: #16181b; --line: #3a3d42; --dim: #999; --band: #1f2226; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem auto;
  max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.dim, caption { color: var(--dim); font-size: 0.87rem; } caption { text-align: left; }
.wide { overflow-x: auto; } img { max-width: 100%; }
table { border-collapse: collapse; font-size: 0.87rem; font-variant-numeric: tabular-nums; margin: 0.5rem 0; }
th, td { padding: 0.2rem 0.7rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child, td.text { text-align: left; } td.text { white-space: normal; }
tbody tr:nth-child(even) { background: var(--band); }
"""


def html_page(title: str, body: Sequence[str]) -> str:
    """Return a whole page, which asks no server for anything."""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            "</head>",
            "<body>",
            *body,
            "</body>",
            "</html>",
            "",
        ]
    )


def html_table(
    caption: str, headings: Sequence[str], rows: Sequence[Sequence[str]], text_from: int = 99
) -> list[str]:
    """Return the lines of a table; its cells hold sentences from column `text_from` on."""

    def cell(at: int, value: str) -> str:
        return f'<td class="text">{escape(value)}</td>' if at >= text_from else f"<td>{escape(value)}</td>"

    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    return [
        '<div class="wide"><table>',
        *([f"<caption>{escape(caption)}</caption>"] if caption else []),
        f"<thead><tr>{head}</tr></thead>",
        "<tbody>",
        *(f"<tr>{''.join(cell(at, value) for at, value in enumerate(row))}</tr>" for row in rows),
        "</tbody>",
        "</table></div>",
    ]


def html_details(summary: str, lines: Sequence[str]) -> list[str]:
    """Return lines that are folded away."""
    return ["<details>", f"<summary>{escape(summary)}</summary>", *lines, "</details>"]


def html_picture(draw: Callable[[bool], bytes], told: str) -> str:
    """Return a picture that follows the page's brightness, with words for those who do not see it."""
    light, dark = (f"data:image/png;base64,{base64.b64encode(draw(kind)).decode()}" for kind in (False, True))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(told, quote=True)}"></picture>'
    )


def html_section(section: Section) -> list[str]:
    """Return the lines of a measure's section."""
    lines = [f"<h2>{escape(section.title)}</h2>", f"<p>{escape(section.note)}</p>"]
    if section.remark:
        lines.append(f'<p class="dim">{escape(section.remark)}</p>')
    lines += [html_picture(picture.draw, picture.told) for picture in section.pictures]
    for table in section.tables:
        if table.is_detail:
            shown = html_table("", table.headings, table.rows, table.text_from)
            lines += html_details(table.caption, shown)
        else:
            lines += html_table(table.caption, table.headings, table.rows, table.text_from)
    return lines


def section_tables(section: Section) -> Group:
    """Return a measure's tables for the terminal, less those that are wide or details."""
    shown: list[RichTable | Text] = []
    for table in section.tables:
        if table.is_detail or table.is_wide:
            continue
        made = terminal_table(table.caption)
        for heading in table.headings:
            made.add_column(Text(heading), justify="right" if made.columns else "left", overflow="fold")
        for row in table.rows:
            made.add_row(*(Text(cell) for cell in row))
        shown.append(made)
    return Group(*shown, *([Text(section.remark, style="dim")] if section.remark else []))


def terminal_table(title: str) -> RichTable:
    """Return an empty table, as reports have them in a terminal."""
    return RichTable(title=Text(title), title_justify="left", box=SIMPLE_HEAD, header_style="bold", padding=0)
