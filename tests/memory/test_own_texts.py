"""What a model writes by itself: written once, kept, and the same for everything that is learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from everlong.memory import infinite_icl, own_texts
from everlong.memory.consolidation import student
from everlong.memory.infinite_icl import InfiniteICL
from everlong.memory.lessons import Lesson, Teacher
from everlong.memory.own_texts import OwnTexts
from everlong.memory.store import MemoryStore
from everlong.reading.attached import AttachedModel
from tests.memory.students import student_of
from tests.memory.test_infinite_icl import TEXT, recipe_of, same


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[AttachedModel]:
    """A student that is measured by few texts."""
    for module in (own_texts, infinite_icl):
        monkeypatch.setattr(module, "MEASURED", 8)
    with student_of() as made:
        yield made


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts were written, each time that some were."""
    counts: list[int] = []
    write = own_texts.unrelated

    def count(writer: Any, texts: int) -> Any:
        counts.append(texts)
        return write(writer, texts)

    monkeypatch.setattr(own_texts, "unrelated", count)
    return counts


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many texts, each time that the model was measured."""
    counts: list[int] = []
    measure = own_texts.measured

    def count(model: Any, adapted: Any, texts: Sequence[Lesson]) -> Any:
        counts.append(len(texts))
        return measure(model, adapted, texts)

    monkeypatch.setattr(own_texts, "measured", count)
    return counts


def equal(ours: Sequence[Lesson], theirs: Sequence[Lesson]) -> bool:
    return len(ours) == len(theirs) and all(
        (a.pair, a.query, a.response, a.ends) == (b.pair, b.query, b.response, b.ends)
        and torch.equal(a.tokens, b.tokens)
        and torch.equal(a.log_probs, b.log_probs)
        and (a.hidden is None) == (b.hidden is None)
        and (a.hidden is None or b.hidden is None or torch.equal(a.hidden, b.hidden))
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("hidden", [False, True])
def test_texts_are_written_once_and_found_as_they_were(
    model: AttachedModel, tmp_path: Path, written: list[int], hidden: bool
) -> None:
    def ask(folder: Path | None) -> list[Lesson]:
        return OwnTexts(model, folder).taught_by(Teacher(model, top_k=8, hidden=hidden), 5)

    first, again, elsewhere, nowhere = (ask(folder) for folder in (tmp_path, tmp_path, tmp_path / "b", None))
    assert written == [5, 5, 5]
    assert first and equal(first, again) and equal(first, elsewhere) and equal(first, nowhere)
    assert not list(tmp_path.rglob("*.scratch"))


def test_what_they_depend_on_tells_them_apart(
    model: AttachedModel, tmp_path: Path, written: list[int]
) -> None:
    texts = OwnTexts(model, tmp_path)
    texts.taught_by(Teacher(model, top_k=8), 5)
    texts.taught_by(Teacher(model, top_k=8), 6)
    texts.taught_by(Teacher(model, top_k=4), 5)
    texts.taught_by(Teacher(model, top_k=8, hidden=True), 5)
    with torch.no_grad():
        model.attachment.model.get_input_embeddings().weight[3] += 0.5  # type: ignore[operator]
    OwnTexts(model, tmp_path).taught_by(Teacher(model, top_k=8), 5)
    assert written == [5, 6, 5, 5, 5]


def test_what_cannot_be_read_is_written_again(
    model: AttachedModel, tmp_path: Path, written: list[int]
) -> None:
    whole = OwnTexts(model, tmp_path).taught_by(Teacher(model), 4)
    (path,) = tmp_path.rglob("*.safetensors")
    for damage in (b"", path.read_bytes()[:-9], b"\0" * 64):
        path.write_bytes(damage)
        assert equal(OwnTexts(model, tmp_path).taught_by(Teacher(model), 4), whole)
    assert written == [4] * 4
    assert equal(OwnTexts(model, tmp_path).taught_by(Teacher(model), 4), whole) and len(written) == 4


def test_where_nothing_can_be_kept_texts_are_written_each_time(
    model: AttachedModel, tmp_path: Path, written: list[int]
) -> None:
    folder = tmp_path / "a file"
    folder.write_text("no folder")
    for _ in range(2):
        assert OwnTexts(model, folder).taught_by(Teacher(model), 3)
    assert written == [3, 3]


def test_an_adapter_is_the_same_with_what_was_kept(
    model: AttachedModel, tmp_path: Path, written: list[int], judged: list[int]
) -> None:
    recipe = recipe_of(anchors=2, ewc=1.0, passes=2)

    def learned(folder: Path | None, seed: int = 0, **changes: Any) -> Any:
        changed = replace(recipe, **changes)
        return InfiniteICL(model, changed, seed=seed, own_texts=OwnTexts(model, folder)).learn(TEXT)

    first, again, alone = learned(tmp_path), learned(tmp_path), learned(None)
    assert same(first, again) and same(first, alone)
    learned(tmp_path, seed=1)
    learned(tmp_path, rank=16, top_k=4)
    assert len(written) == 3 and len(judged) == 2, "of the base model, whatever adapter is to be learned"
    with student(model, InfiniteICL(model, recipe).config()):
        pass
    learned(tmp_path)
    assert len(written) == 3 and len(judged) == 2
    with torch.no_grad():
        model.attachment.model.get_input_embeddings().weight[3] += 0.5  # type: ignore[operator]
    learned(tmp_path)
    assert len(written) == 4 and len(judged) == 3
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-9])
    learned(tmp_path)
    assert len(written) == 5 and len(judged) == 4


@pytest.mark.parametrize("damage", ["no slopes", "other layers", "nothing"])
def test_a_curvature_that_is_not_of_these_layers_is_measured_again(
    model: AttachedModel, tmp_path: Path, judged: list[int], damage: str
) -> None:
    recipe = recipe_of(ewc=1.0, passes=1)
    first = InfiniteICL(model, recipe, own_texts=OwnTexts(model, tmp_path)).learn(TEXT)
    (path,) = (
        path for path in tmp_path.rglob("*.safetensors") if any("slopes" in name for name in load_file(path))
    )
    tensors = load_file(path)
    if damage == "no slopes":
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("slopes")}
    if damage == "other layers":
        tensors = {f"other.{name}": tensor for name, tensor in tensors.items()}
    save_file({} if damage == "nothing" else tensors, path, metadata={"values": "{}"})
    again = InfiniteICL(model, recipe, own_texts=OwnTexts(model, tmp_path)).learn(TEXT)
    assert len(judged) == 2 and same(first, again)


def test_the_same_curvature_serves_recipes_with_more_texts(
    model: AttachedModel, tmp_path: Path, written: list[int], judged: list[int]
) -> None:
    for anchors in (2, 6):
        recipe = recipe_of(ewc=1.0, passes=2, anchors=anchors)
        InfiniteICL(model, recipe, own_texts=OwnTexts(model, tmp_path)).learn(TEXT)
    assert written == [8, 12] and judged == [8]


def test_what_a_killed_process_left_is_swept(model: AttachedModel, tmp_path: Path) -> None:
    texts = OwnTexts(model, tmp_path)
    texts.taught_by(Teacher(model), 3)
    (path,) = tmp_path.rglob("*.safetensors")
    left = path.parent / "0123.scratch"
    left.mkdir()
    texts.taught_by(Teacher(model), 4)
    assert not left.exists()


def test_a_store_does_not_take_them_for_a_memory(model: AttachedModel, tmp_path: Path) -> None:
    store = MemoryStore(tmp_path / "memories")
    OwnTexts(model, store.folder).taught_by(Teacher(model), 3)
    assert store.list() == () and store.broken() == () and list(store.folder.rglob("*.safetensors"))
    assert store.reset() == 0
    assert not list(store.folder.rglob("*.safetensors")), "they leave with the memories"
