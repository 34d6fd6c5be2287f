"""Where memories live: a folder of folders, each an adapter that PEFT and vLLM's filesystem resolver read."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from everlong.errors import ConfigurationError, MemoryStoreError, UnknownNameError
from everlong.memory.adapter import Adapter
from everlong.memory.disk import (
    ANOTHER_FOLDER,
    OWN_TEXTS,
    UNFINISHED,
    erase,
    explained,
    put_back,
    put_in_place,
)
from everlong.memory.folder import (
    PAIRS_FILE,
    BrokenMemory,
    Memory,
    is_memory,
    memories_in,
    read_memory,
    write_memory,
)
from everlong.memory.lexical import LexicalIndex
from everlong.memory.pairs import Pair, write_pairs
from everlong.memory.record import MemoryRecord, check_name, write_record
from everlong.models.files import SCRATCH_SUFFIX, bytes_under, make_folder, scratch_folder, sweep
from everlong.models.store import default_home
from everlong.registry import unknown_name


class MemoryStore:
    """The memories in one folder.

    A memory becomes visible whole, under its name, or not at all; one that is replaced gets a new folder, so
    that whoever reads the old one goes on reading the old one. Several processes may share a store.

    Parameters
    ----------
    folder : str or Path, optional
        Created when something is put into it. By default ``memories`` under ``EVERLONG_HOME``.

    Raises
    ------
    UnknownNameError
        By every method that takes the name of a memory that should exist, if none is called that.
    MemoryStoreError
        By every method, if the disk is full or the folder cannot be read or written; what was there stays.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = default_home() / "memories" if folder is None else Path(folder).expanduser()

    def __repr__(self) -> str:
        return f"MemoryStore({str(self.folder)!r})"

    def add(
        self, record: MemoryRecord, adapter: Adapter, pairs: Iterable[Pair] = (), *, replace: bool = False
    ) -> Memory:
        """Keep an adapter as the memory that `record` names.

        Parameters
        ----------
        record : MemoryRecord
            What is known about it.
        adapter : Adapter
            Plain LoRA of a rank in {8, 16, 32, 64, 128}, or a cartridge.
        pairs : iterable of Pair
            What it was learned from.
        replace : bool
            Whether a memory of that name may be deleted for it.

        Raises
        ------
        ConfigurationError
            If the name is taken, or the record contradicts the adapter.
        InputError
            If the adapter is not one that every server loads as it is.
        """
        self.require_free(record.name, replace)
        adapter.require_plain(record.kind)
        rank = getattr(adapter.config, "r", None)
        if record.rank != rank:
            raise ConfigurationError(
                f"the record of {record.name!r} has rank {record.rank}, the adapter {rank}"
            )
        with self._writing(f"keep memory {record.name!r}"):
            self.require_free(record.name, replace)
            with scratch_folder(self.folder) as scratch:
                draft = make_folder(scratch / record.name)
                write_memory(draft, record, adapter, pairs)
                path = self.folder / record.name
                put_in_place(draft, path)
        return Memory(path, record)

    def get(self, name: str) -> Memory:
        """Open a memory.

        Raises
        ------
        MemoryStoreError
            If its files are damaged.
        """
        return read_memory(self.path(name))

    def path(self, name: str) -> Path:
        """Return the folder of a memory, sound or broken."""
        # Only names of folders that are there become paths.
        known = [path.name for path in memories_in(self.folder)]
        if name in known:
            return self.folder / name
        if known:
            raise unknown_name("memory", name, known)
        raise UnknownNameError(f"unknown memory {name!r}; there are none in {self.folder}")

    def list(self) -> tuple[Memory, ...]:
        """Open all memories that are sound, by name."""
        return tuple(memory for memory in self._all() if isinstance(memory, Memory))

    def broken(self) -> tuple[BrokenMemory, ...]:
        """Return the memories whose files are damaged, with the reason of each."""
        return tuple(memory for memory in self._all() if isinstance(memory, BrokenMemory))

    def search(self, text: str, k: int = 5) -> tuple[tuple[Memory, float], ...]:
        """Return the `k` memories whose pairs share most words with `text`, the best first.

        Beside each stands its score, that of :class:`everlong.memory.lexical.LexicalIndex`; memories that
        share no word are left out.
        """
        memories = self.list()
        index = LexicalIndex(
            "\n".join(f"{pair.query}\n{pair.response}" for pair in memory.pairs()) for memory in memories
        )
        return tuple((memories[number], score) for number, score in index.search(text, k))

    def update(self, record: MemoryRecord, pairs: Iterable[Pair] | None = None) -> Memory:
        """Write down something new about a memory, such as its recall once that is measured.

        Parameters
        ----------
        record : MemoryRecord
            The memory's record with the changes: ``dataclasses.replace(memory.record, recall=…)``.
        pairs : iterable of Pair, optional
            Its pairs, if they are to be others.

        Raises
        ------
        ConfigurationError
            If it would be another base model, kind or rank: other weights are another memory.
        """
        memory = self.get(record.name)
        for field in ("kind", "rank", "base_model", "base_hash"):
            if getattr(record, field) != getattr(memory.record, field):
                raise ConfigurationError(
                    f"the {field} of {record.name!r} cannot be changed: add another memory, with "
                    f"replace=True if it is to have the same name"
                )
        with self._writing(f"update memory {record.name!r}"):
            if pairs is not None:
                with scratch_folder(self.folder) as scratch:
                    write_pairs(scratch / PAIRS_FILE, pairs)
                    os.replace(scratch / PAIRS_FILE, memory.path / PAIRS_FILE)
            write_record(memory.path, record)
        return Memory(memory.path, record)

    def rename(self, old: str, new: str) -> Memory:
        """Give a memory another name.

        Raises
        ------
        ConfigurationError
            If the new name is taken, or is none.
        """
        self.get(old)
        with self._writing(f"rename memory {old!r}"):
            self.require_free(new, replace=False)
            path = self.folder / new
            os.rename(self.path(old), path)
            memory = read_memory(path)
            write_record(path, memory.record)
        return memory

    def merge(
        self,
        names: Sequence[str],
        into: str,
        *,
        weights: Sequence[float] | None = None,
        replace: bool = False,
    ) -> Memory:
        """Combine memories of one base model into a new one, whose effect is the weighted sum of theirs.

        Exact up to a joint rank of 128, above that the best approximation of rank 128; the new record's
        ``recipe.values`` hold the method and its relative error.

        Parameters
        ----------
        names : sequence of str
            LoRA memories. They stay.
        into : str
            Name of the new memory.
        weights : sequence of float, optional
            What each one's effect is multiplied with; 1 by default.
        replace : bool
            Whether a memory of the new name may be deleted for it.

        Raises
        ------
        ConfigurationError
            If they are fewer than two, of different base models, or one is a cartridge.
        """
        from everlong.memory.merging import merged

        self.require_free(into, replace)
        return self.add(*merged([self.get(name) for name in names], into, weights), replace=replace)

    def export(self, name: str, path: str | Path) -> Path:
        """Copy the folder of a memory to `path`, which must not exist yet, and return it.

        Raises
        ------
        ConfigurationError
            If something is there.
        """
        memory, target = self.get(name), Path(path).expanduser()
        if os.path.lexists(target):
            raise ConfigurationError(f"{target} exists: name a folder that does not")
        with (
            explained(target.parent, f"export memory {name!r}", "choose another folder"),
            scratch_folder(target.parent) as scratch,
        ):
            copy = make_folder(scratch / "copy")
            for file in filter(Path.is_file, memory.path.iterdir()):
                shutil.copyfile(file, copy / file.name)
            os.replace(copy, target)
        return target

    def delete(self, name: str) -> int:
        """Delete a memory, sound or broken, and return the bytes that freed."""
        self.path(name)
        with self._writing(f"delete memory {name!r}", "delete what is left of it by hand"):
            path = self.path(name)
            freed = 0 if path.is_symlink() else bytes_under(path)
            # Renamed first: whoever looks in the middle sees no memory rather than half of one. A new folder
            # to move it into would need room, and this is done where there is none.
            left = self.folder / f"{uuid.uuid4().hex[:12]}{SCRATCH_SUFFIX}"
            os.replace(path, left)
            erase(left)
        return freed

    def reset(self) -> int:
        """Delete all memories, sound and broken, and return their number.

        What of a text was not learned to its end, and what models wrote by themselves, is deleted, too; other
        files stay.
        """
        paths = memories_in(self.folder)
        for path in paths:
            self.delete(path.name)
        for beside in (self.folder / UNFINISHED, self.folder / OWN_TEXTS):
            if beside.exists():
                with self._writing(f"delete {beside.name}", "delete what is left of it by hand"):
                    erase(beside)
        return len(paths)

    def _all(self) -> Iterator[Memory | BrokenMemory]:
        for path in memories_in(self.folder):
            try:
                yield read_memory(path)
            except MemoryStoreError as error:
                yield BrokenMemory(path, str(error))

    def require_free(self, name: str, replace: bool) -> None:
        """Raise unless a memory may be kept under that name: it is new, or `replace` it."""
        check_name(name)
        with explained(self.folder, f"keep memory {name!r}"):
            there = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        same = [other for other in there if other.casefold() == name.casefold()]
        if not same or (replace and same == [name] and is_memory(self.folder / name)):
            return
        if same != [name]:
            raise ConfigurationError(
                f"memory {name!r} would differ from {same[0]!r} by upper and lower case only, which some "
                f"systems do not tell apart: take another name"
            )
        if not is_memory(self.folder / name):
            raise ConfigurationError(
                f"{self.folder / name} is something else than a memory: take another name"
            )
        raise ConfigurationError(
            f"there is a memory {name!r} already: take another name, delete it, or replace it (--replace, or "
            "replace=True)"
        )

    @contextmanager
    def _writing(self, task: str, remedy: str = ANOTHER_FOLDER) -> Iterator[None]:
        """Hold the store's lock, with what a killed process left half-done put right."""
        with explained(self.folder, task, remedy), FileLock(make_folder(self.folder) / ".lock"):
            put_back(self.folder)
            sweep(self.folder)
            yield
