"""One memory on disk: a folder with PEFT's two files, a record and the pairs it was learned from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from everlong.errors import InputError, MemoryStoreError
from everlong.memory.adapter import Adapter, check_files
from everlong.memory.compatible import CONFIG_FILE, WEIGHTS_FILE
from everlong.memory.disk import explained
from everlong.memory.pairs import Pair, read_pairs, write_pairs
from everlong.memory.record import RECORD_FILE, MemoryRecord, read_record, write_record
from everlong.models.files import SCRATCH_SUFFIX, bytes_under

PAIRS_FILE = "pairs.jsonl"


@dataclass(frozen=True)
class Memory:
    """A memory in a store.

    Attributes
    ----------
    path : Path
        Its folder, which PEFT's ``PeftModel.from_pretrained`` reads.
    record : MemoryRecord
        What is known about it.
    """

    path: Path
    record: MemoryRecord

    @property
    def name(self) -> str:
        """The memory's name."""
        return self.record.name

    @property
    def bytes(self) -> int:
        """What its folder takes on disk."""
        return bytes_under(self.path)

    def pairs(self) -> list[Pair]:
        """Read the pairs it was learned from."""
        path = self.path / PAIRS_FILE
        return list(read_pairs(path)) if path.is_file() else []

    def adapter(self) -> Adapter:
        """Read its weights and their configuration."""
        return Adapter.load(self.path)


@dataclass(frozen=True)
class BrokenMemory:
    """A folder in a store that cannot be read as a memory, and why."""

    path: Path
    reason: str

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name


def is_memory(path: Path) -> bool:
    """Tell whether a path is the folder of a memory, sound or broken, rather than something else."""
    return any((path / name).is_file() for name in (RECORD_FILE, CONFIG_FILE, WEIGHTS_FILE))


def memories_in(folder: Path) -> list[Path]:
    """Return the folders of memories, sound or broken, in a store's folder, by name.

    Raises
    ------
    MemoryStoreError
        If the folder cannot be read.
    """
    with explained(folder, "list memories"):
        if not folder.is_dir():
            return []
        visible = [path for path in folder.iterdir() if path.name[0] != "." and path.suffix != SCRATCH_SUFFIX]
        return sorted(path for path in visible if is_memory(path))


def read_memory(path: Path) -> Memory:
    """Open the folder of a memory and check all of its files.

    Raises
    ------
    MemoryStoreError
        If one is missing or cannot be read.
    """
    record = read_record(path)
    check_files(path)
    memory = Memory(path, record)
    try:
        memory.pairs()
    except (InputError, OSError) as error:
        raise MemoryStoreError(str(error)) from error
    return memory


def write_memory(path: Path, record: MemoryRecord, adapter: Adapter, pairs: Iterable[Pair]) -> None:
    """Write all files of a memory into an empty folder.

    Raises
    ------
    OSError
        If there is no room, or no right to.
    """
    adapter.save(path, record.base_model)
    write_pairs(path / PAIRS_FILE, pairs)
    write_record(path, record)
