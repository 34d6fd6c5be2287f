"""What can go wrong with files, in words."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from everlong.errors import MemoryStoreError, ModelFileError

ANOTHER_FOLDER = "choose another folder (EVERLONG_HOME)"
"""The remedy where a store's folder cannot be used."""

REPLACED_SUFFIX = ".replaced"
"""What a folder that is being replaced ends in, for an instant."""

UNFINISHED = ".unfinished"
"""What the folder in a store is called that holds how far learning has come."""

OWN_TEXTS = ".own-texts"
"""And that which holds what models write by themselves."""


@contextmanager
def explained(folder: Path, task: str, remedy: str = ANOTHER_FOLDER) -> Iterator[None]:
    """Turn the operating system's errors inside the block into ours, with a remedy."""
    try:
        yield
    except MemoryStoreError:
        raise
    except OSError as error:
        cause = error
        if isinstance(error, ModelFileError) and isinstance(error.__cause__, OSError):
            cause = error.__cause__
        if cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise MemoryStoreError(
                f"no room to {task} in {folder}: free some space, delete a memory "
                f"(everlong memory delete NAME) or {remedy}"
            ) from error
        raise MemoryStoreError(f"cannot {task} in {folder}: {cause.strerror or cause}; {remedy}") from error


def erase(path: Path) -> None:
    """Delete a folder with all that is in it; of a link, only the link.

    Raises
    ------
    OSError
        If something of it stays.
    """
    if path.is_symlink():
        os.unlink(path)
    else:
        shutil.rmtree(path)


def put_in_place(draft: Path, path: Path) -> None:
    """Move a folder to `path`; one that is there is deleted once the new one stands in its place.

    Raises
    ------
    OSError
        If it cannot be moved; then the old one stands there as before.
    """
    old = path.with_name(f".{path.name}{REPLACED_SUFFIX}")
    replaces = path.exists()
    if replaces:
        os.replace(path, old)
    try:
        os.replace(draft, path)
    except OSError:
        if replaces:
            os.replace(old, path)
        raise
    if replaces:
        erase(old)


def put_back(folder: Path) -> None:
    """Finish, or undo, what a process that was killed in :func:`put_in_place` began."""
    for old in folder.glob(f".*{REPLACED_SUFFIX}"):
        path = old.with_name(old.name[1 : -len(REPLACED_SUFFIX)])
        if path.exists():
            erase(old)
        else:
            os.replace(old, path)
