"""Turning what a session is given to read into a stream of text pieces or token ids."""

from __future__ import annotations

import io
import operator
import os
import stat
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeAlias

import torch

from everlong.errors import InputError

Source: TypeAlias = "str | Path | IO[str] | IO[bytes] | Iterable[str] | Iterable[int] | torch.Tensor"
"""Text; the path of a text file; an open text or binary file; an iterable of text pieces; token ids."""

PIECE = 16_384  # characters or bytes taken from a source at a time


class TextPieces:
    """Text that arrives in pieces of at most `PIECE` characters; iterate once.

    Parameters
    ----------
    name : str
        What error messages call it.
    pieces : iterator of str
        The text.
    characters, size : int, optional
        Its length in characters, or in bytes, where known.
    opened : open file, optional
        What to close in the end.
    """

    def __init__(
        self,
        name: str,
        pieces: Iterator[str],
        *,
        characters: int | None = None,
        size: int | None = None,
        opened: IO[bytes] | None = None,
    ) -> None:
        self.name = name
        self._opened = opened
        self._pieces = pieces
        self._characters = characters
        self._size = size
        self._taken = 0  # characters
        self._taken_bytes = 0

    @property
    def fraction(self) -> float | None:
        """How much of it has been taken, from 0 to 1; None where its length is unknown."""
        if self._characters:
            return self._taken / self._characters
        return min(1.0, self._taken_bytes / self._size) if self._size else None

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            for start in range(0, len(piece), PIECE):
                part = piece[start : start + PIECE] if len(piece) > PIECE else piece
                try:
                    self._taken_bytes += len(part.encode())
                except UnicodeEncodeError as error:
                    raise InputError(
                        f"{self.name}: character {self._taken + error.start} is half of a surrogate pair, "
                        "which is not text; decode the input with errors='replace'"
                    ) from None
                self._taken += len(part)
                yield part
        if not self._taken:
            raise InputError(f"{self.name} is empty: there is nothing to read")

    def close(self) -> None:
        """Close the file, if this opened it."""
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()
        if self._opened is not None:
            self._opened.close()


class TokenPieces:
    """Token ids that arrive in lists of at most `PIECE`; iterate once."""

    def __init__(self, ids: Iterator[Any], vocabulary: int, size: int | None = None) -> None:
        self.name = "the ids"
        self._size = size
        self._ids = ids
        self._vocabulary = vocabulary
        self._taken = 0

    @property
    def fraction(self) -> float | None:
        """How much of them has been taken, from 0 to 1; None where their number is unknown."""
        return self._taken / self._size if self._size else None

    def __iter__(self) -> Iterator[list[int]]:
        piece: list[int] = []
        for item in self._ids:
            piece.append(self._checked(item))
            self._taken += 1
            if len(piece) == PIECE:
                yield piece
                piece = []
        if not self._taken:
            raise InputError("the ids are empty: there is nothing to read")
        if piece:
            yield piece

    def close(self) -> None:
        """Nothing to close."""

    def _checked(self, item: Any) -> int:
        try:
            token = operator.index(item)
        except TypeError:
            raise InputError(f"id {self._taken} is {item!r}; token ids are whole numbers") from None
        if not 0 <= token < self._vocabulary:
            raise InputError(
                f"id {self._taken} is {token}, outside the model's vocabulary of {self._vocabulary} tokens; "
                "the ids must come from this model's own tokenizer"
            )
        return token


def open_source(source: Source, vocabulary: int) -> TextPieces | TokenPieces:
    """Open `source` without reading it.

    Parameters
    ----------
    source : str, Path, open file, iterable of str, iterable or tensor of int
        A `str` is text, never the name of a file. Files are read as UTF-8 (an open text file in its own
        encoding), with line ends translated as Python's text files do.
    vocabulary : int
        Number of token ids the model knows.

    Raises
    ------
    InputError
        Nothing there, a directory, an empty or a binary file (with the offset of the first byte that is
        not text), an id outside the vocabulary, or something else altogether. What is wrong inside a
        source is raised when it is reached.
    """
    if isinstance(source, str):
        _warn_of_a_file_name(source)
        return TextPieces("the text", iter([source] if source else []), characters=len(source))
    if isinstance(source, Path):
        return _open_path(source)
    if isinstance(source, torch.Tensor):
        return _open_tensor(source, vocabulary)
    if callable(getattr(source, "read", None)):
        name = str(getattr(source, "name", "the open file"))
        return TextPieces(name, _decoded(source, name), size=_size(source))  # type: ignore[arg-type]
    if isinstance(source, (bytes, bytearray, memoryview)):
        raise InputError("bytes are not text: decode them first, or pass the open binary file")
    if not isinstance(source, Iterable):
        raise InputError(
            f"cannot read a {type(source).__name__}: pass text, a pathlib.Path, an open file, "
            "an iterable of strings, or token ids"
        )
    size = len(source) if isinstance(source, Sequence) else None
    items = iter(source)
    first = next(items, None)
    if first is None:
        raise InputError("the iterable is empty: there is nothing to read")
    everything = chain([first], items)
    if isinstance(first, str):
        return TextPieces("the iterable", _checked_strings(everything))
    return TokenPieces(everything, vocabulary, size)


def _open_path(path: Path) -> TextPieces:
    if path.is_dir():
        raise InputError(f"{path} is a directory: pass the files in it one by one")
    try:
        file = path.open("rb")
        size = path.stat().st_size
    except OSError as error:
        raise InputError(
            f"cannot open {path}: {error.strerror or error}; check the name and its permissions"
        ) from None

    return TextPieces(str(path), _decoded(file, str(path)), size=size, opened=file)


def _size(file: Any) -> int | None:
    """Bytes of an open regular file at its beginning; None for a pipe, or one already read from."""
    try:
        status = os.fstat(file.fileno())
        return status.st_size if stat.S_ISREG(status.st_mode) and not file.tell() else None
    except (OSError, ValueError, AttributeError):
        return None


def _open_tensor(ids: torch.Tensor, vocabulary: int) -> TokenPieces:
    if ids.is_floating_point() or ids.dtype is torch.bool or ids.is_complex():
        raise InputError(f"token ids are whole numbers, not {ids.dtype}")
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise InputError(f"a session reads one row of ids, of shape (n,) or (1, n), not {tuple(ids.shape)}")
    blocks = (block for start in range(0, len(ids), PIECE) for block in ids[start : start + PIECE].tolist())
    return TokenPieces(blocks, vocabulary, len(ids))


def _checked_strings(items: Iterator[Any]) -> Iterator[str]:
    for number, item in enumerate(items):
        if not isinstance(item, str):
            raise InputError(
                f"item {number} of the iterable is a {type(item).__name__}, not a string like the first"
            )
        yield item


def _decoded(file: IO[str] | IO[bytes], name: str) -> Iterator[str]:
    """Yield the text of an open file: as it comes if opened as text, else decoded from UTF-8."""
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = 0  # of the first byte of `rest`
    rest = b""
    while True:
        try:
            block = file.read(PIECE)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name} is not {error.encoding} text ({error.reason}); open it with its own encoding"
            ) from None
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {name}: {error}; open it for reading") from None
        if isinstance(block, str):
            if "\0" in block:
                raise InputError(_binary(name, f"character {offset + block.index(chr(0))}", "a NUL"))
            offset += len(block)
            text, ended = block, not block
        else:
            text, rest, offset = _utf8(rest + (block or b""), offset, name, final=not block)
            text, ended = newlines.decode(text, final=not block), not block
        try:
            if text:
                yield text
        except GeneratorExit:
            if rest and file.seekable():  # the reading was stopped: half a character is left for the next
                file.seek(-len(rest), os.SEEK_CUR)
            raise
        if ended:
            return


def _utf8(data: bytes, offset: int, name: str, final: bool) -> tuple[str, bytes, int]:
    """Decode what is complete of `data`; return the text, the unfinished rest, and the rest's offset."""
    if offset == 0 and data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{name} is UTF-16 text (byte 0 is a UTF-16 byte order mark); convert it to UTF-8")
    if b"\0" in data:
        raise InputError(_binary(name, f"byte {offset + data.index(0)}", "a NUL"))
    try:
        text, rest = data.decode(), b""
    except UnicodeDecodeError as error:
        if final or error.reason != "unexpected end of data":
            raise InputError(_binary(name, f"byte {offset + error.start}", "not UTF-8")) from None
        text, rest = data[: error.start].decode(), data[error.start :]
    if offset == 0 and text.startswith("\ufeff"):  # a byte order mark is no text
        text = text[1:]
    return text, rest, offset + len(data) - len(rest)


def _binary(name: str, place: str, what: str) -> str:
    return (
        f"{name} is not a text file: {place} is {what}; convert it to UTF-8 text first (what is text: "
        "iconv -f latin1 -t utf-8), or, from Python, open it with its own encoding and pass the open file"
    )


def _warn_of_a_file_name(text: str) -> None:
    if 0 < len(text) < 256 and "\n" not in text:
        try:
            exists = Path(text).is_file()
        except (OSError, ValueError):
            return
        if exists:
            warnings.warn(
                f"reading the text {text!r}, not the file of that name; for the file pass a Path",
                stacklevel=4,
            )
