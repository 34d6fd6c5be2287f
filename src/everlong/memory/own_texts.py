"""Texts that a base model writes by itself, and what it expects in them: the same for all of its memories."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from everlong.errors import ModelFileError
from everlong.memory.anchors import unrelated
from everlong.memory.lessons import Lesson, Teacher, lessons_restored, lessons_state
from everlong.memory.writer import Writer
from everlong.models.files import make_folder, scratch_folder

_FOLDER = ".own-texts"
_FORMAT = 1  # raised when other texts would be written, or these in another way


class OwnTexts:
    """Lets a model write, or finds what it wrote before.

    Parameters
    ----------
    store : Path or None
        The folder of a store of memories, where texts are kept beside these, a few megabytes for a model;
        None: nowhere. If nothing can be kept there, or what is there cannot be read, they are written again.
    """

    def __init__(self, store: Path | None = None) -> None:
        self.folder = None if store is None else store / _FOLDER

    def taught_by(self, teacher: Teacher, count: int) -> list[Lesson]:
        """Return so many texts of the teacher's model, with what it expects in them.

        It must be the base model: its adapters are set aside.
        """
        path = None if self.folder is None else self.folder / f"{_key(teacher, count)}.safetensors"
        found = None if path is None else _read(path)
        if found is None:
            found = teacher.teach(unrelated(Writer(teacher.model), count), gain=False)
            if path is not None:
                _write(path, found)
        return found


def _key(teacher: Teacher, count: int) -> str:
    model = teacher.model
    identity = (
        *(_FORMAT, count, teacher.top_k, teacher.keeps_hidden),
        *(model.weights_hash, model.packed_as, model.tokenizer_hash),
    )
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]


def _read(path: Path) -> list[Lesson] | None:
    try:
        with safe_open(path, framework="pt") as file:
            values: list[dict[str, Any]] = json.loads(file.metadata()["lessons"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return lessons_restored(tensors, values, "text")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, lessons: list[Lesson]) -> None:
    tensors, values = lessons_state(lessons, "text")
    try:
        with scratch_folder(make_folder(path.parent)) as scratch:
            save_file(tensors, scratch / path.name, metadata={"lessons": json.dumps(values)})
            os.replace(scratch / path.name, path)
    except (OSError, ModelFileError, SafetensorError):
        return  # what is learned does not depend on it
