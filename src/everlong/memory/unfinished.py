"""What a memory that is being learned needs to go on from its last whole segment, on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from everlong.memory.disk import UNFINISHED, erase, explained, put_back, put_in_place
from everlong.memory.progress import Progress
from everlong.models.files import make_folder, scratch_folder, sweep

_STATE, _TENSORS = "state.json", "state.safetensors"


class Unfinished:
    """The last whole segment of one text being learned in one way, by any number of processes.

    Parameters
    ----------
    store : Path
        The store's folder.
    *identity : object
        All that the result depends on: what differs in any of it is learned from the beginning.
    """

    def __init__(self, store: Path, *identity: Any) -> None:
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
        self.folder = store / UNFINISHED / key

    def save(self, progress: Progress) -> None:
        """Put `progress` in the place of what was saved before.

        Raises
        ------
        MemoryStoreError
            There is no room, or no right to; what was saved before is still there.
        """
        with self._writing("save how far learning has come"):
            make_folder(self.folder)
            put_back(self.folder)
            sweep(self.folder)
            before = self._saved()
            with scratch_folder(self.folder) as draft:
                tensors, values = progress.state()
                save_file(tensors, draft / _TENSORS)
                (draft / _STATE).write_text(json.dumps(values), encoding="utf-8")
                path = self.folder / f"segment-{progress.segment}"
                put_in_place(draft, path)
            for other in before:
                if _number(other) < progress.segment:  # another process may be ahead
                    erase(other)

    def load(self) -> Progress | None:
        """Return what was saved last; None: nothing, or nothing that can be read."""
        for path in reversed(self._saved()):
            try:
                return _read(path)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError):
                continue
        return None

    def discard(self) -> None:
        """Delete what was saved."""
        if self.folder.exists():
            with self._writing("delete what is finished"):
                if self.folder.exists():
                    erase(self.folder)

    @contextmanager
    def _writing(self, task: str) -> Iterator[None]:
        """Let no other process save or delete meanwhile."""
        with explained(self.folder, task), FileLock(make_folder(self.folder.parent) / ".lock"):
            yield

    def _saved(self) -> list[Path]:
        found = [path for path in self.folder.glob("segment-*") if path.name[8:].isdigit()]
        return sorted(found, key=_number)


def _number(path: Path) -> int:
    return int(path.name[8:])


def _read(path: Path) -> Progress:
    values = json.loads((path / _STATE).read_text(encoding="utf-8"))
    return Progress.restored(load_file(path / _TENSORS), values)
