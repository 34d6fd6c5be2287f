"""What can be read, and what is refused, by name and place."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from everlong.errors import InputError
from everlong.reading.source import PIECE, TextPieces, TokenPieces, open_source

TEXT = "naïve café 中文 🙂\n" * 3000


def whole(source: Any) -> str:
    opened = open_source(source, 100)
    assert isinstance(opened, TextPieces)
    return "".join(opened)


def numbers(source: Any) -> list[int]:
    opened = open_source(source, 100)
    assert isinstance(opened, TokenPieces)
    return [token for piece in opened for token in piece]


def test_a_text_a_path_an_open_file_and_an_iterable_give_the_same_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    assert whole(TEXT) == TEXT
    assert whole(path) == TEXT
    with path.open(encoding="utf-8") as file:
        assert whole(file) == TEXT
    with path.open("rb") as binary:
        assert whole(binary) == TEXT
    assert whole(iter(TEXT.splitlines(keepends=True))) == TEXT


def test_pieces_are_small_however_large_the_source(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    for source in (TEXT, path, [TEXT]):
        opened = open_source(source, 100)
        assert isinstance(opened, TextPieces)
        assert max(len(piece) for piece in opened) <= PIECE


def test_line_ends_are_those_of_python_text_files(tmp_path: Path) -> None:
    path = tmp_path / "dos.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"a\r\nb\rc\n" * PIECE)
    assert whole(path) == "a\nb\nc\n" * PIECE == path.read_text(encoding="utf-8-sig")


def test_characters_cut_by_the_end_of_a_block_are_whole(tmp_path: Path) -> None:
    for shift in range(4):
        path = tmp_path / "text.txt"
        path.write_text("x" * shift + "🙂" * PIECE, encoding="utf-8")
        assert whole(path) == "x" * shift + "🙂" * PIECE


@pytest.mark.parametrize(
    "ids",
    [[1, 2, 3], (1, 2, 3), range(1, 4), iter([1, 2, 3]), torch.tensor([1, 2, 3]), torch.tensor([[1, 2, 3]])],
)
def test_ids_are_read_as_they_are(ids: Any) -> None:
    assert numbers(ids) == [1, 2, 3]


def test_how_much_was_taken_is_known_where_the_length_is(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    for source in (
        TEXT,
        path,
        path.open(encoding="utf-8"),
        torch.ones(50_000, dtype=torch.long),
        [1] * 50_000,
    ):
        opened = open_source(source, 100)
        pieces = iter(opened)
        next(pieces)
        assert opened.fraction is not None and 0.2 < opened.fraction < 0.6
        list(pieces)
        assert opened.fraction == 1
    assert open_source(iter(["a"]), 100).fraction is None


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"text\0text", "byte 4 "),
        (b"a" * (PIECE - 1) + b"\xc3\xa9" + b"\xff", f"byte {PIECE + 1} "),
        (b"abc\xe2\x82", "byte 3 "),
        (b"x" * 3 * PIECE + b"\0", f"byte {3 * PIECE} "),
        (b"\xff\xfea\0b\0", "UTF-16"),
    ],
)
def test_a_binary_file_is_refused_with_the_offset_of_the_byte(
    tmp_path: Path, content: bytes, place: str
) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"image.png.*{place}") as caught:
        whole(path)
    assert "convert" in str(caught.value)
    if b"\0" in content or b"\xff" in content:
        with path.open(encoding="utf-8") as file, pytest.raises(InputError, match="not.*text"):
            whole(file)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "text is empty"),
        ([], "iterable is empty"),
        (["", ""], "is empty"),
        (io.StringIO(""), "is empty"),
        (torch.empty(0, dtype=torch.long), "ids are empty"),
        (b"bytes", "decode them"),
        (None, "cannot read a NoneType"),
        (["a", 1], "item 1 .* is a int"),
        ([1, "a"], "id 1 is 'a'"),
        ([1, 100], "id 1 is 100, outside .* 100 tokens"),
        ([-1], "id 0 is -1"),
        ([1.5], "id 0 is 1.5"),
        (torch.tensor([1.0]), "whole numbers"),
        (torch.ones(2, 3, dtype=torch.long), r"shape .*\(2, 3\)"),
        ("half \ud800 character", "character 5"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(source: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(open_source(source, 100))


def test_a_missing_file_a_directory_and_a_closed_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot open .*missing.txt: No such file"):
        whole(tmp_path / "missing.txt")
    with pytest.raises(InputError, match="is a directory"):
        whole(tmp_path)
    path = tmp_path / "text.txt"
    path.write_text("a")
    file = path.open()
    file.close()
    with pytest.raises(InputError, match="closed file"):
        whole(file)
    with path.open("w") as file, pytest.raises(InputError, match="open it for reading"):
        whole(file)
    path.write_text("")
    with pytest.raises(InputError, match="text.txt is empty"):
        whole(path)


def test_a_text_that_is_the_name_of_a_file_is_read_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("novel.txt").write_text("a")
    with pytest.warns(UserWarning, match="pass a Path"):
        assert whole("novel.txt") == "novel.txt"
