"""Files on disk: written whole or not at all, checked by SHA-256, and clear errors when the disk is full."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from everlong.errors import ConfigurationError, ModelFileError

SCRATCH_SUFFIX = ".scratch"
"""What half-done files and folders end in, until they are renamed or swept away."""


_UNITS = {"": 1, "bytes": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "tb": 1000**4}


def human_bytes(count: float) -> str:
    """Write a number of bytes the way people read it: ``538 MB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if count >= 10 or unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def parse_bytes(text: str) -> int:
    """Return the number of bytes that a text tells, such as ``4GB``, ``500 MB`` or ``1024``.

    Raises
    ------
    ConfigurationError
        It is no number of bytes.
    """
    found = re.fullmatch(r"\s*([\d.]+)\s*(|bytes|kb|mb|gb|tb)\s*", text.lower())
    try:
        count = float(found[1]) if found else math.nan
    except ValueError:
        count = math.nan
    if found is None or not 0 <= count < math.inf:
        raise ConfigurationError(f"{text!r} is no number of bytes: write 4GB, 500MB or 1000000")
    return round(count * _UNITS[found[2]])


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_under(folder: Path) -> int:
    """Return the bytes of all files below `folder`, 0 where there is none."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name), follow_symlinks=False).st_size
            except FileNotFoundError:
                continue  # a download's temporary file that was just renamed
    return total


def make_folder(folder: Path) -> Path:
    """Create `folder` with its parents.

    Raises
    ------
    ModelFileError
        If it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelFileError(
            f"cannot create {folder}: {error.strerror}; set EVERLONG_HOME to a folder that can be written"
        ) from error
    if not os.access(folder, os.W_OK):
        raise ModelFileError(f"cannot write to {folder}; set EVERLONG_HOME to a folder that can be written")
    return folder


def disk_full(folder: Path, needed: int, task: str) -> ModelFileError:
    """Build the error for a disk that has no room for `needed` more bytes."""
    free = shutil.disk_usage(folder).free
    return ModelFileError(
        f"no room to {task}: it needs about {human_bytes(needed)} and {folder} has {human_bytes(free)} free; "
        f"free some space, remove a model (everlong remove NAME) or set EVERLONG_HOME to another disk"
    )


def require_space(folder: Path, needed: int, task: str) -> None:
    """Raise :class:`ModelFileError` unless `needed` bytes are free where `folder` lies."""
    if shutil.disk_usage(folder).free < needed:
        raise disk_full(folder, needed, task)


@contextmanager
def full_disk_explained(folder: Path, needed: int, task: str) -> Iterator[None]:
    """Turn the operating system's "no space left" inside the block into our error."""
    try:
        yield
    except ModelFileError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(folder, needed, task) from error
        raise ModelFileError(f"cannot {task}: {error}") from error


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Give a fresh folder inside `parent`, which is gone after the block whatever happens."""
    folder = make_folder(parent / f"{uuid.uuid4().hex[:12]}{SCRATCH_SUFFIX}")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Remove what a process that was killed left half-done in `parent`."""
    if parent.is_dir():
        for path in parent.glob(f"*{SCRATCH_SUFFIX}"):
            shutil.rmtree(path, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` such that a reader sees the old content or the new, never a part."""
    with scratch_folder(path.parent) as scratch:
        draft = scratch / path.name
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
