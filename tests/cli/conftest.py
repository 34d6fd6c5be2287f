"""A tiny model in a folder, and a command line run on it."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from everlong.cli.app import run
from tests.tiny import byte_llama

TEXT = "It is a truth universally acknowledged, that a single man must be in want of a wife. " * 20


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads and writes bytes, trained to 64 of them."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    model, tokenizer = byte_llama()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def novel(tmp_path: Path) -> Path:
    path = tmp_path / "novel.txt"
    path.write_text(TEXT)
    return path


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def everlong(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Run a command on the tiny model: ``everlong("read", path, stdin="…")``."""

    def call(command: str, *words: object, stdin: str | bytes = "") -> Result:
        data = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        capsys.readouterr()
        code = run([*command.split(), "--model", str(folder), "--device", "cpu", *map(str, words)])
        shown = capsys.readouterr()
        return Result(code, shown.out, shown.err)

    return call
