"""What tests of evaluation are given: one thread, on which tiny models are fastest, such a model, a text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from everlong.models.loading import LoadedModel
from tests import tiny
from tests.evaluation.measuring import TEXT


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def loaded() -> LoadedModel:
    model, tokenizer = tiny.byte_llama(max_position_embeddings=512)
    return LoadedModel(model, tokenizer, "tiny", "given")


@pytest.fixture
def novel(tmp_path: Path) -> str:
    path = tmp_path / "novel.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer of bytes is good enough for long texts."""
    monkeypatch.setattr("everlong.memory.segments._SHATTERED", 2.0)
