"""Damaged memories, full disks, processes that die or wait for each other: what was there stays."""

import errno
import json
import os
import pickle
import resource
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from everlong.errors import MemoryStoreError
from everlong.memory.record import Recipe
from everlong.memory.store import MemoryStore
from tests.memory.adapters import PAIRS, content, lora, record

# --- broken ------------------------------------------------------------------------------------------


def damage_record(folder):
    (folder / "memory.json").write_text("{")


def damage_field(folder):
    values = json.loads((folder / "memory.json").read_text())
    (folder / "memory.json").write_text(json.dumps({**values, "rank": "many"}))


def later_format(folder):
    values = json.loads((folder / "memory.json").read_text())
    (folder / "memory.json").write_text(json.dumps({**values, "format": 2, "new": 1}))


def foreign(folder):
    (folder / "memory.json").unlink()


def truncate_weights(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def pickle_weights(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")


def lose_config(folder):
    (folder / "adapter_config.json").unlink()


def damage_pairs(folder):
    (folder / "pairs.jsonl").write_text("[]\n")


DAMAGES = {
    damage_record: "memory.json does not describe a memory",
    damage_field: "rank cannot be 'many'",
    later_format: "format 2, this Everlong reads 1",
    foreign: "memory.json cannot be read",
    truncate_weights: "adapter_model.safetensors is damaged",
    pickle_weights: "other formats are not read",
    lose_config: "no adapter_config.json",
    damage_pairs: "line 1: not a pair",
}


@pytest.mark.parametrize("damage, reason", DAMAGES.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_memory_is_listed_with_its_reason_and_can_be_deleted(kept, damage, reason):
    kept.add(record("sound"), lora(), PAIRS)
    damage(kept.folder / "handbook")
    assert [memory.name for memory in kept.list()] == ["sound"]
    (broken,) = kept.broken()
    assert broken.name == "handbook" and reason in broken.reason
    assert [memory.name for memory, _ in kept.search("bees")] == ["sound"]
    with pytest.raises(MemoryStoreError, match=reason):
        kept.get("handbook")
    assert kept.delete("handbook") > 0 and kept.broken() == ()


def test_pickled_weights_are_never_opened(kept, tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    folder = kept.folder / "handbook"
    memory = kept.get("handbook")
    for name in ("adapter_model.bin", "adapter_model.safetensors"):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(MemoryStoreError, match="damaged"):
        memory.adapter()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(MemoryStoreError, match="other formats are not read"):
        memory.adapter()
    assert not (tmp_path / "sprung").exists()


# --- disks, processes --------------------------------------------------------------------------------


@contextmanager
def little_room(size):
    """Within the block no file grows past so many bytes, as on a full disk; not even the log of the tests."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 3000])
def test_a_full_disk_leaves_what_was_there(kept, tmp_path, size):
    before = content(kept.folder)
    with little_room(size):  # the configuration does not fit, or the weights do not
        with pytest.raises(MemoryStoreError, match="no room to keep memory 'new'.*everlong memory delete"):
            kept.add(record("new"), lora(1))
        with pytest.raises(MemoryStoreError, match="no room to keep memory 'handbook'"):
            kept.add(record(), lora(1), replace=True)
        with pytest.raises(MemoryStoreError, match="no room to update"):
            kept.update(record(recipe=Recipe("x", {"long": "x" * 4000})))
        with pytest.raises(MemoryStoreError, match="no room to export"):
            kept.export("handbook", tmp_path / "copy")
        unchanged = content(kept.folder) == before and not (tmp_path / "copy").exists()
        freed = kept.delete("handbook")
    assert unchanged and freed > 0
    assert not list(kept.folder.glob("*.scratch")) and not list(tmp_path.glob("*.scratch"))


def test_a_folder_that_cannot_be_made_or_read_is_our_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MemoryStoreError, match="cannot keep memory 'handbook'.*EVERLONG_HOME"):
        MemoryStore(tmp_path / "file" / "memories").add(record(), lora())


def test_a_place_to_export_to_that_cannot_be_made_is_our_error(kept, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        MemoryStoreError, match="cannot export memory.*Not a directory; choose another folder$"
    ):
        kept.export("handbook", tmp_path / "file" / "copy")


def test_a_replacement_that_cannot_be_moved_in_puts_the_old_one_back(kept, monkeypatch):
    before, replace = content(kept.folder), os.replace

    def fail(source, target):
        if str(target) == str(kept.folder / "handbook") and "replaced" not in str(source):
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(MemoryStoreError, match="Input/output error"):
        kept.add(record(), lora(1), replace=True)
    monkeypatch.undo()
    assert content(kept.folder) == before


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_process_that_is_killed_while_it_replaces_leaves_the_old_or_the_new(kept, at):
    """It dies before its nth rename or deletion; the next writer finds one memory or the other, whole."""
    script = f"""
import os, shutil
from everlong.memory import disk
from everlong.memory.store import MemoryStore
store = MemoryStore({str(kept.folder)!r})
adapter, record = store.get("new").adapter(), store.get("handbook").record
steps = []
def dying(real):
    def step(*arguments):
        if "handbook" in str(arguments) and str(arguments[0]).count("memory.json") == 0:
            steps.append(real)
            if len(steps) > {at}:
                os._exit(9)
        return real(*arguments)
    return step
os.replace, disk.erase = dying(os.replace), dying(disk.erase)
store.add(record, adapter, replace=True)
"""
    kept.add(record("new"), lora(1))
    before = {name: data for name, data in content(kept.folder).items() if name.startswith("handbook")}
    assert subprocess.run([sys.executable, "-c", script]).returncode == 9
    kept.add(record("other"), lora())
    assert [memory.name for memory in kept.list()] == ["handbook", "new", "other"] and not kept.broken()
    after = {name: data for name, data in content(kept.folder).items() if name.startswith("handbook")}
    assert (after == before) == (at < 2)
    assert not [
        path for path in kept.folder.iterdir() if path.name not in (".lock", *("handbook", "new", "other"))
    ]


def test_what_a_killed_process_left_is_swept_away(kept):
    (kept.folder / "0123456789ab.scratch" / "handbook").mkdir(parents=True)
    assert len(kept.list()) == 1
    kept.add(record("other"), lora())
    assert not list(kept.folder.glob("*.scratch"))


def test_writers_wait_for_each_other(store):
    adapter, errors = lora(), []

    def add(name):
        try:
            store.add(record(name), adapter, PAIRS)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=add, args=(f"m{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(store.list()) == 8 and not store.broken()
