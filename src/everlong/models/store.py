"""The models on this machine: fetched, checked, converted once, and removed again.

Everything lies under one folder, ``EVERLONG_HOME``::

    models/<name>/<file>.gguf      as published, kept: its 4-bit values are wanted later
    models/<name>/converted-1/     safetensors in float32, and the tokenizer
    models/<name>/parts/           finished parts of a pull that was interrupted
    gguf/<sha256>/converted-1/     conversions of the user's own .gguf files
    terms/<name>.json              licences that were accepted
    locks/                         so that two processes do not pull at once
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from filelock import FileLock
from platformdirs import user_cache_dir

from everlong.errors import ModelFileError
from everlong.models import terms
from everlong.models.catalogue import CATALOGUE, CatalogueEntry
from everlong.models.conversion import FORMAT, convert_in_subprocess, is_complete
from everlong.models.files import SCRATCH_SUFFIX, bytes_under, make_folder, scratch_folder, sha256_of, sweep
from everlong.models.pulling import OnProgress, PullProgress, fetch_documents, fetch_gguf, ignore
from everlong.registry import Registry


@dataclass(frozen=True)
class ModelState:
    """What of a catalogue entry is on this machine, and the bytes it takes there."""

    entry: CatalogueEntry
    state: Literal["not pulled", "pulled", "ready"]
    bytes: int


def default_home() -> Path:
    """Return ``EVERLONG_HOME``, by default the platform's folder for caches."""
    chosen = os.environ.get("EVERLONG_HOME")
    return Path(chosen).expanduser() if chosen else Path(user_cache_dir("everlong", appauthor=False))


@dataclass(frozen=True)
class Store:
    """The models below one folder.

    Parameters
    ----------
    home : Path
        The folder; created when something is put into it.
    catalogue : Registry of CatalogueEntry
        What can be pulled.
    """

    home: Path = field(default_factory=default_home)
    catalogue: Registry[CatalogueEntry] = CATALOGUE

    def folder(self, name: str) -> Path:
        """Return the folder of a catalogue model. Only catalogue names become paths."""
        return self.home / "models" / self.catalogue[name].name

    def gguf_path(self, name: str) -> Path:
        """Return where the model's GGUF lies once pulled."""
        return self.folder(name) / self.catalogue[name].gguf

    def converted_path(self, name: str) -> Path:
        """Return where the model's safetensors and tokenizer lie once converted."""
        return self.folder(name) / FORMAT

    def state(self, name: str) -> ModelState:
        """Tell what of one catalogue model is here."""
        entry = self.catalogue[name]
        held = bytes_under(self.folder(name))
        if not self._has_gguf(entry):
            return ModelState(entry, "not pulled", held)
        return ModelState(entry, "ready" if is_complete(self.converted_path(name)) else "pulled", held)

    def states(self) -> list[ModelState]:
        """Tell what of every catalogue model is here."""
        return [self.state(name) for name in self.catalogue]

    def terms_text(self, name: str) -> str:
        """Return the licence that has to be accepted, fetched first if need be; "" if there is none.

        Raises
        ------
        ModelFileError
            If the text cannot be fetched.
        """
        entry = self.catalogue[name]
        if entry.terms is None:
            return ""
        document = self.folder(name) / entry.terms.document.name
        if not document.is_file():
            with self._locked(name, ignore):
                fetch_documents(entry, self.folder(name))
        return terms.readable(document.read_text(encoding="utf-8"))

    def terms_accepted(self, name: str) -> bool:
        """Tell whether the licence was accepted on this machine; True where nothing has to be."""
        return terms.accepted(self.home, self.catalogue[name])

    def accept_terms(self, name: str) -> None:
        """Remember that the licence was accepted."""
        terms.accept(self.home, self.catalogue[name])

    def pull(self, name: str, *, progress: OnProgress | None = None) -> Path:
        """Fetch a catalogue model and convert it, as far as that has not been done.

        Finished parts of an interrupted pull are checked and used. Another process that pulls the same model
        is waited for.

        Parameters
        ----------
        name : str
            A name of the catalogue.
        progress : callable, optional
            Called with a :class:`PullProgress` several times a second.

        Returns
        -------
        Path
            A folder that ``from_pretrained`` reads.

        Raises
        ------
        UnknownNameError
            If the catalogue has no such model.
        ModelFileError
            If its terms were not accepted, or it cannot be fetched, checked, converted or stored.
        """
        entry, report = self.catalogue[name], progress or ignore
        converted = self.converted_path(name)
        if self._has_gguf(entry) and is_complete(converted):
            return converted
        terms.require_accepted(self.home, entry)
        with self._locked(name, report):
            sweep(self.folder(name))
            if not self._has_gguf(entry):
                fetch_documents(entry, self.folder(name))
                fetch_gguf(entry, self.folder(name), report)
            if not is_complete(converted):
                report(PullProgress("convert", name))
                self._check_gguf(entry)
                convert_in_subprocess(self.gguf_path(name), converted, entry.converted_size)
        return converted

    def convert_file(self, gguf: Path, *, progress: OnProgress | None = None) -> Path:
        """Convert the user's own ``.gguf`` file, once for each content.

        Returns
        -------
        Path
            A folder that ``from_pretrained`` reads.

        Raises
        ------
        ModelFileError
            If the file cannot be read or converted.
        """
        try:
            key = sha256_of(gguf)[:32]
        except OSError as error:
            raise ModelFileError(f"cannot read {gguf}: {error.strerror}") from error
        report, converted = progress or ignore, self.home / "gguf" / key / FORMAT
        if not is_complete(converted):
            with self._locked(key, report):
                sweep(converted.parent)
                if not is_complete(converted):
                    report(PullProgress("convert", gguf.name))
                    convert_in_subprocess(gguf, converted)
        return converted

    def conversions(self) -> dict[str, int]:
        """Return the conversions of the user's own files: ``gguf:<hash>`` and the bytes they take."""
        folder = self.home / "gguf"
        found = sorted(p for p in folder.iterdir() if p.suffix != SCRATCH_SUFFIX) if folder.is_dir() else []
        return {f"gguf:{path.name}": bytes_under(path) for path in found}

    def remove(self, name: str) -> int:
        """Delete a model, GGUF and conversion, and return the bytes that freed.

        Parameters
        ----------
        name : str
            A name of the catalogue, or ``gguf:<hash>`` as :meth:`conversions` lists them.

        Raises
        ------
        UnknownNameError
            If it is neither.
        """
        own = self.conversions()
        folder = self.home / "gguf" / name.removeprefix("gguf:") if name in own else self.folder(name)
        with self._locked(folder.name, ignore):
            freed = bytes_under(folder)
            if folder.is_dir():
                # Renamed first: whoever looks in the middle sees no model rather than half of one.
                with scratch_folder(folder.parent) as trash:
                    os.replace(folder, trash / folder.name)
        return freed

    def _has_gguf(self, entry: CatalogueEntry) -> bool:
        path = self.gguf_path(entry.name)
        return path.is_file() and path.stat().st_size == entry.size

    @contextmanager
    def _locked(self, name: str, report: OnProgress) -> Iterator[None]:
        """Hold the lock of one model, having said so if another process holds it."""
        lock = FileLock(make_folder(self.home / "locks") / f"{name}.lock")
        if not _try(lock):
            report(PullProgress("wait", name))
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _check_gguf(self, entry: CatalogueEntry) -> None:
        path = self.gguf_path(entry.name)
        if sha256_of(path) != entry.sha256:
            raise ModelFileError(
                f"{path} is damaged: its checksum is not the catalogue's; run `everlong remove {entry.name}` "
                f"and pull it again"
            )


def _try(lock: FileLock) -> bool:
    """Acquire `lock` if that is possible at once."""
    try:
        lock.acquire(blocking=False)
    except TimeoutError:
        return False
    return True
