"""Finished rows in one file, so that a measurement can be interrupted and taken up again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from everlong.errors import ConfigurationError, InputError
from everlong.evaluation.resources import describe_machine

_FORMAT = 1


class KeptRows:
    """Rows by key, in a JSON file that is written anew, as a whole, after each of them.

    Parameters
    ----------
    path : Path
        Of the file, which need not be there yet.
    setting : dict
        What all rows have in common, such as the model; plain values.

    Raises
    ------
    InputError
        The file holds something else, or cannot be read.
    ConfigurationError
        Its rows are of another setting.
    """

    def __init__(self, path: Path, setting: dict[str, Any]) -> None:
        self.path = path
        self.setting: dict[str, Any] = json.loads(json.dumps(setting))
        self._here = describe_machine()
        self.machines = [self._here]
        """The machines that rows were measured on, and this one."""
        self.rows: dict[str, dict[str, Any]] = {}
        self.measured_on: dict[str, int] = {}
        """On which of the machines a row was measured, where that is known."""
        if path.exists():
            self._read()

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.rows[key] = row
        self.measured_on[key] = self.machines.index(self._here)
        saved = {"format": _FORMAT, "setting": self.setting, "machines": self.machines}
        saved |= {"rows": self.rows, "measured_on": self.measured_on}
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(saved, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(beside, self.path)
        except OSError as error:
            raise InputError(
                f"cannot write {self.path}: {error.strerror}; choose another folder with --output"
            ) from error

    def _read(self) -> None:
        try:
            saved = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"cannot go on with {self.path}: {error}; choose another --output") from error
        parts = {"setting": dict, "machines": list, "rows": dict}
        if (
            not isinstance(saved, dict)
            or saved.get("format") != _FORMAT
            or any(not isinstance(saved.get(name), kind) for name, kind in parts.items())
            or not isinstance(saved.get("measured_on", {}), dict)
        ):
            raise InputError(f"{self.path} holds no rows of a measurement; choose another --output")
        if saved["setting"] != self.setting:
            names = [name for name in self.setting if saved["setting"].get(name) != self.setting[name]]
            told = ", ".join(
                f"{name} {saved['setting'].get(name)}, not {self.setting[name]}" for name in names
            )
            raise ConfigurationError(
                f"{self.path} holds rows of another measurement ({told}); choose another --output"
            )
        self.rows = saved["rows"]
        if self.rows:
            machines = saved["machines"]
            self.machines = machines if self._here in machines else [*machines, self._here]
            only = dict.fromkeys(self.rows, 0) if len(machines) == 1 else {}
            self.measured_on = saved.get("measured_on", only)
