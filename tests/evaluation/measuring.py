"""What tests of measures have in common: a text, settings, rows as a report keeps them, what it says."""

from __future__ import annotations

import io
import json
from typing import Any

from rich.console import Console

from everlong.evaluation.finding_report import FindingReport, page
from everlong.evaluation.kept import KeptRows
from everlong.evaluation.long_inputs import Way, make_ways
from everlong.evaluation.measures import Measure, Section, taken
from everlong.evaluation.page_parts import section_tables
from everlong.evaluation.resources import describe_machine
from everlong.models.loading import LoadedModel
from tests.evaluation.test_finding_report import Reader

TEXT = "Orla Finch keeps seven bees in Sligo. Bennet paints wooden boats beside the harbour. " * 30
QUICK = {
    **{"generators": ("text",), "selection": "all", "passes": 1},
    **{"anchors": 0, "ewc": 0, "continuations": 0, "readings": 0},
}
SMALL = {"window": 60, "sinks": 4, "recalled": 32, "block": 16}


def ways(*names: str, **options: Any) -> list[Way]:
    return make_ways(names, options)


def rows_of(measure: Measure, loaded: LoadedModel, *some: Way, kept: KeptRows | None = None) -> list[Any]:
    """Take all steps; what they give is what JSON makes of it."""
    rows = list(taken(measure.steps(loaded, some), kept, lambda done, note: None))
    return [json.loads(json.dumps(row, allow_nan=False)) for row in rows]


def said(section: Section) -> tuple[str, str]:
    """Return what the page and what the terminal say."""
    report = FindingReport("tiny", (), (describe_machine(),), {}, {}, (section,))
    reader, target = Reader(page(report)), io.StringIO()
    assert not reader.open and json.dumps(report.as_json(), allow_nan=False)
    Console(file=target, width=100).print(section_tables(section))
    return reader.said, target.getvalue()
