"""What a memory that is being learned needs to go on from its last whole segment, on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from everlong.memory.disk import erase, explained
from everlong.memory.gate import Worth
from everlong.memory.lessons import Lesson
from everlong.memory.pairs import Pair
from everlong.memory.progress import Account, Progress
from everlong.models.files import make_folder, scratch_folder, sweep

_FOLDER = ".unfinished"
_STATE, _LESSONS = "state.json", "lessons.safetensors"


class Unfinished:
    """The last whole segment of one text being learned in one way.

    Parameters
    ----------
    store : Path
        The store's folder.
    *identity : object
        All that the result depends on: what differs in any of it is learned from the beginning.
    """

    def __init__(self, store: Path, *identity: Any) -> None:
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
        self.folder = store / _FOLDER / key

    def save(self, progress: Progress) -> None:
        """Put `progress` in the place of what was saved before.

        Raises
        ------
        MemoryStoreError
            There is no room, or no right to; what was saved before is still there.
        """
        with explained(self.folder, "save how far learning has come"):
            make_folder(self.folder)
            sweep(self.folder)
            before = self._saved()
            with scratch_folder(self.folder) as draft:
                for number, adapter in enumerate(progress.adapters):
                    save_file(adapter, draft / f"adapter-{number}.safetensors")
                save_file(_tensors(progress.pool), draft / _LESSONS)
                (draft / _STATE).write_text(json.dumps(_values(progress)), encoding="utf-8")
                os.replace(draft, self.folder / f"segment-{progress.segment}")
            for path in before:
                erase(path)

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
            with explained(self.folder, "delete what is finished"):
                erase(self.folder)

    def _saved(self) -> list[Path]:
        found = [path for path in self.folder.glob("segment-*") if path.name[8:].isdigit()]
        return sorted(found, key=lambda path: int(path.name[8:]))


def _tensors(pool: list[Lesson]) -> dict[str, Tensor]:
    found = {}
    for number, lesson in enumerate(pool):
        found[f"{number}.tokens"] = lesson.tokens.to(torch.int32)
        found[f"{number}.log_probs"] = lesson.log_probs
        if lesson.hidden is not None:
            found[f"{number}.hidden"] = lesson.hidden
    return found


def _values(progress: Progress) -> dict[str, Any]:
    return {
        "segment": progress.segment,
        "adapters": len(progress.adapters),
        "pairs": [asdict(pair) for pair in progress.pairs],
        "pool": [
            {"pair": asdict(x.pair), "query": x.query, "response": x.response, "ends": x.ends}
            for x in progress.pool
        ],
        "account": {
            **vars(progress.account),
            "dropped": dict(progress.account.dropped),
            "worth": {name: asdict(worth) for name, worth in progress.account.worth.items()},
        },
    }


def _read(path: Path) -> Progress:
    values = json.loads((path / _STATE).read_text(encoding="utf-8"))
    tensors = load_file(path / _LESSONS)
    pool = [
        Lesson(
            _pair(saved["pair"]),
            saved["query"],
            saved["response"],
            tensors[f"{number}.tokens"].long(),
            tensors[f"{number}.log_probs"],
            tensors.get(f"{number}.hidden"),
            saved["ends"],
        )
        for number, saved in enumerate(values["pool"])
    ]
    account = Account(**values["account"])
    return Progress(
        values["segment"],
        [load_file(path / f"adapter-{number}.safetensors") for number in range(values["adapters"])],
        pool,
        [_pair(saved) for saved in values["pairs"]],
        replace(
            account,
            dropped=Counter(account.dropped),
            worth={name: Worth(**worth) for name, worth in values["account"]["worth"].items()},
        ),
    )


def _pair(values: dict[str, Any]) -> Pair:
    return Pair(**{**values, "sentences": tuple(values["sentences"])})
