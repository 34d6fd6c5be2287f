"""The head of a GGUF file: its metadata and the list of its tensors, read in a tenth of a second.

transformers dequantises and names the tensors; what is read here is what it leaves out or gets wrong: whether
the file is complete, and what its tokenizer really is.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from everlong.errors import ModelFileError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file: `shape` fastest dimension first, `kind` as GGML numbers its types."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def elements(self) -> int:
        """The number of values."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def bytes(self) -> int:
        """The bytes it takes in the file; 0 if its type is not known."""
        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(self.kind)]
        except ValueError:
            return 0
        return self.elements // block * size


@dataclass(frozen=True)
class GgufHeader:
    """What stands before the tensors' data."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    data_start: int

    @property
    def architecture(self) -> str:
        """The architecture as llama.cpp calls it."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def elements(self) -> int:
        """The number of values in all tensors."""
        return sum(tensor.elements for tensor in self.tensors)

    def token(self, which: str) -> str | None:
        """Return the special token `which` ("bos", "eos", "unknown", "padding", "eot") if there is one."""
        index = self.metadata.get(f"tokenizer.ggml.{which}_token_id")
        tokens = self.metadata.get("tokenizer.ggml.tokens", [])
        return str(tokens[index]) if isinstance(index, int) and 0 <= index < len(tokens) else None


class _Cursor:
    """Reads little-endian values one after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def scalar(self, code: str) -> Any:
        value = struct.unpack_from(f"<{code}", self.data, self.at)[0]
        self.at += struct.calcsize(code)
        return value

    def text(self) -> str:
        length = self.scalar("Q")
        if length > len(self.data) - self.at:
            raise struct.error("a text reaches past the end of the file")
        start, self.at = self.at, self.at + length
        return self.data[start : self.at].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise ValueError(f"unknown value type {kind}")
        return self.scalar(_SCALARS[kind])

    def array(self) -> list[Any]:
        kind, count = self.scalar("I"), self.scalar("Q")
        if count > len(self.data) - self.at:
            raise struct.error("a list reaches past the end of the file")
        if kind not in _SCALARS:
            return [self.value(kind) for _ in range(count)]
        values = list(struct.unpack_from(f"<{count}{_SCALARS[kind]}", self.data, self.at))
        self.at += count * struct.calcsize(_SCALARS[kind])
        return values


def read_header(path: Path) -> GgufHeader:
    """Read a GGUF's metadata and tensor list, and see that the file is complete.

    Raises
    ------
    ModelFileError
        If the file cannot be read, is no GGUF, is one part of several, or is truncated.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != b"GGUF":
                raise ModelFileError(f"{path} is not a GGUF file: it begins with {data[:4]!r}, not b'GGUF'")
            header = _parse(path, _Cursor(data))
            size = len(data)
    except struct.error as error:
        raise ModelFileError(f"{path} is truncated: it ends within its header; fetch it again") from error
    except ValueError as error:  # mmap of an empty file, or a value of no known type
        raise ModelFileError(f"{path} is not a readable GGUF file: {error}") from error
    except OSError as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"cannot read {path}: {error.strerror or error}") from error
    end = max((header.data_start + t.offset + t.bytes for t in header.tensors), default=0)
    if end > size:
        raise ModelFileError(
            f"{path} is truncated: its tensors need {end} bytes and it has {size}; fetch it again"
        )
    if int(header.metadata.get("split.count", 1)) > 1:
        raise ModelFileError(
            f"{path} is one of {header.metadata['split.count']} parts; join them with llama.cpp's "
            f"`llama-gguf-split --merge` first"
        )
    return header


def _parse(path: Path, cursor: _Cursor) -> GgufHeader:
    cursor.at = 4
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise ValueError(f"version {version} (2 and 3 are known, little-endian)")
    tensor_count, pair_count = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.scalar("I"))
    tensors = []
    for _ in range(tensor_count):
        name, dimensions = cursor.text(), cursor.scalar("I")
        shape = tuple(cursor.scalar("Q") for _ in range(dimensions))
        tensors.append(TensorInfo(name, shape, cursor.scalar("I"), cursor.scalar("Q")))
    alignment = int(metadata.get("general.alignment", _DEFAULT_ALIGNMENT))
    return GgufHeader(path, metadata, tuple(tensors), -(-cursor.at // alignment) * alignment)
