"""What a base model writes by itself, expects in it, and how firmly: the same for all of its memories."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from everlong.errors import ModelFileError
from everlong.memory.anchors import unrelated
from everlong.memory.curvature import CURVATURE, Curvature, adapted_layers, measured
from everlong.memory.disk import OWN_TEXTS
from everlong.memory.lessons import Lesson, Teacher, lessons_restored, lessons_state
from everlong.memory.writer import Writer
from everlong.models.files import make_folder, scratch_folder, sweep
from everlong.reading.attached import AttachedModel

_FORMAT = 2  # raised when other texts would be written, or these in another way

MEASURED = 64
"""Texts by which a model is measured, if it wrote so many."""


class OwnTexts:
    """Lets a model write, or finds what it wrote before.

    Parameters
    ----------
    model : AttachedModel
        The base model: it has no adapter yet, or they are set aside.
    store : Path or None
        The folder of a store of memories, where all this is kept beside these: a few megabytes of texts for
        a model, and half a kilobyte of curvature for each input and each output of a linear layer. None:
        nowhere. If nothing can be kept there, or what is there cannot be read, it is made again.
    """

    def __init__(self, model: AttachedModel, store: Path | None = None) -> None:
        self.model = model
        self.folder = None if store is None else store / OWN_TEXTS
        self._identity: list[object] = [_FORMAT]
        if store is not None:
            self._identity += [model.weights_hash, model.packed_as, model.tokenizer_hash]

    def taught_by(self, teacher: Teacher, count: int) -> list[Lesson]:
        """Return so many texts, with what a teacher, who is the base model, expects in them."""
        path = self._path(count, teacher.top_k, teacher.keeps_hidden)
        found = _read(path)
        if found is not None:
            try:
                tensors, values = found
                return lessons_restored(tensors, values["lessons"], "text")
            except (ValueError, KeyError, TypeError):
                pass  # another file than was written here
        texts = teacher.teach(unrelated(Writer(self.model), count), gain=False)
        tensors, lessons = lessons_state(texts, "text")
        _write(path, tensors, {"lessons": lessons})
        return texts

    def curvature(self, adapted: nn.Module, texts: Sequence[Lesson]) -> Curvature:
        """Return what the first of the model's texts tell of its weights; see :func:`measured`.

        It is rounded as it is kept, kept or not, that what is learned be the same.
        """
        texts = texts[:MEASURED]
        written = [(text.query, text.response) for text in texts]
        path = self._path("curvature", CURVATURE, written)
        found = _read(path)
        if found is not None and (known := _restored(found[0], adapted)) is not None:
            return known
        state = measured(self.model, adapted, texts).state()
        _write(path, state, {})
        return Curvature.restored(state)

    def _path(self, *what: object) -> Path | None:
        if self.folder is None:
            return None
        key = hashlib.sha256(json.dumps([*self._identity, *what]).encode()).hexdigest()[:24]
        return self.folder / f"{key}.safetensors"


def _restored(tensors: dict[str, Tensor], adapted: nn.Module) -> Curvature | None:
    """Return the curvature of a model's layers; None: it is not of these, or not whole."""
    try:
        found = Curvature.restored(tensors)
    except KeyError:
        return None
    layers = {name for name, _ in adapted_layers(adapted)}
    return found if found.factors and layers.issuperset(found.factors) else None


def _read(path: Path | None) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the tensors and the values of a file; None: there is none that can be read."""
    if path is None:
        return None
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads(file.metadata()["values"])
            return {name: file.get_tensor(name) for name in file.keys()}, values  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path | None, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    if path is None:
        return
    folder = path.parent
    try:
        with FileLock(make_folder(folder) / ".lock"):
            sweep(folder)
            with scratch_folder(folder) as scratch:
                save_file(tensors, scratch / path.name, metadata={"values": json.dumps(values)})
                os.replace(scratch / path.name, path)
    except (OSError, ModelFileError, SafetensorError):
        return  # what is learned does not depend on it
