"""What the benchmark scripts share: rows that survive an interruption, and a dated table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from everlong.cli.app import SPIN_COUNT
from everlong.evaluation.resources import describe_machine, machine_line

RESULTS = Path(__file__).parent / "results"


class Rows:
    """Finished rows in a JSON file, so that a run can be interrupted and taken up again.

    Parameters
    ----------
    path : Path
        Of the JSON file; written after every row.
    setting : dict
        What all rows were measured with.

    Raises
    ------
    SystemExit
        The file has rows of another setting: they are not written over.
    """

    def __init__(self, path: Path, setting: dict[str, Any]) -> None:
        self.path = path
        self.machine = describe_machine()
        self.setting = json.loads(json.dumps(setting))
        self.rows: dict[str, Any] = {}
        if path.exists():
            saved = json.loads(path.read_text())
            if saved["setting"] != self.setting:
                raise SystemExit(
                    f"{path} holds rows of another setting, {saved['setting']}, not {self.setting}: "
                    "give another --output, or move it away"
                )
            self.rows, self.machine = saved["rows"], saved["machine"]

    def get(self, key: str, measure: Callable[[], Any]) -> Any:
        """Return the row `key`, measured if it is not there yet."""
        if key not in self.rows:
            print(f"measuring {key} …", flush=True)
            self.rows[key] = measure()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            saved = {"machine": self.machine, "setting": self.setting, "rows": self.rows}
            self.path.write_text(json.dumps(saved, indent=1))
        return self.rows[key]

    def write_table(self, title: str, lines: list[str]) -> None:
        """Write the Markdown page beside the JSON file, and print it."""
        page = "\n".join([f"# {title}", "", machine_line(self.machine), "", *lines, ""])
        self.path.with_suffix(".md").write_text(page)
        print(page)


WAITING = {
    "sleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin briefly": {"GOMP_SPINCOUNT": str(SPIN_COUNT)},
    "never sleep": {"OMP_WAIT_POLICY": "ACTIVE"},
}
"""What the environment says of how threads wait."""


def in_own_process(script: str, *arguments: object, waiting: str | None = None) -> Any:
    """Return what `script` prints as JSON in a process of its own, where threads wait as `waiting` says."""
    environment = dict(os.environ)
    if waiting is not None:
        for key in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
            environment.pop(key, None)
        environment |= WAITING[waiting]
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(headings: list[str], rows: list[list[str]]) -> list[str]:
    """Return a Markdown table, the first column to the left."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows)]
