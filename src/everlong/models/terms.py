"""Licences that have to be accepted: their text for reading, and a record of who accepted what, when."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

from everlong.errors import ModelFileError
from everlong.models.catalogue import CatalogueEntry
from everlong.models.files import make_folder, write_atomically

_BLOCKS = {"p", "h1", "h2", "h3", "h4", "li", "ol", "ul", "div", "br", "tr", "table"}
_SKIPPED = {"script", "style", "button", "template", "svg", "aside", "nav", "title"}
_VOID = {"br", "hr", "img", "input", "link", "meta"}


class _ArticleText(HTMLParser):
    """Collects the text of a page's article body, one line a paragraph."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._depth = 0
        self._skipping = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _VOID:
            self.pieces.append("\n" if tag == "br" else "")
        elif self._depth:
            self._depth += 1
            self._skipping += tag in _SKIPPED or bool(self._skipping)
            self.pieces.append("\n\n" if tag in _BLOCKS else "")
        elif "devsite-article-body" in (dict(attrs).get("class") or ""):
            self._depth = 1

    def handle_endtag(self, tag: str) -> None:
        if self._depth and tag not in _VOID:
            self._depth -= 1
            self._skipping -= bool(self._skipping)
            self.pieces.append("\n\n" if tag in _BLOCKS else "")

    def handle_data(self, data: str) -> None:
        if self._depth and not self._skipping:
            self.pieces.append(re.sub(r"\s+", " ", data))


def readable(page: str) -> str:
    """Return the article of an HTML page as plain text, the whole page's text if it has no article."""
    parser = _ArticleText()
    parser.feed(page)
    text = "".join(parser.pieces) or re.sub(r"<[^>]*>", " ", page)
    return re.sub(r"[ \t]*\n[ \t]*(\n[ \t]*)*", "\n\n", text).strip()


def record_path(home: Path, entry: CatalogueEntry) -> Path:
    """Return where acceptance of the entry's terms is remembered."""
    return home / "terms" / f"{entry.name}.json"


def accepted(home: Path, entry: CatalogueEntry) -> bool:
    """Tell whether the terms of `entry`, in its version, were accepted; True where there are none."""
    if entry.terms is None:
        return True
    try:
        record = json.loads(record_path(home, entry).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("document_sha256") == entry.terms.document.sha256


def accept(home: Path, entry: CatalogueEntry) -> None:
    """Remember that the terms of `entry` were accepted."""
    if entry.terms is None:
        return
    record = {
        "model": entry.name,
        "licence": entry.licence,
        "url": entry.terms.url,
        "document_sha256": entry.terms.document.sha256,
        "accepted": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path = record_path(home, entry)
    make_folder(path.parent)
    write_atomically(path, json.dumps(record, indent=2) + "\n")


def require_accepted(home: Path, entry: CatalogueEntry) -> None:
    """Raise :class:`ModelFileError`, saying how to accept, unless the terms were accepted."""
    if entry.terms is not None and not accepted(home, entry):
        raise ModelFileError(
            f"{entry.name} comes under the {entry.licence} ({entry.terms.url}), to be accepted once: "
            f"run `everlong pull {entry.name}` in a terminal, or, having read them, "
            f"`everlong pull {entry.name} --accept-terms`"
        )
