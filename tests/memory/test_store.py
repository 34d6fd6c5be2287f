"""Where memories live: found again as they were, whole or not at all, and gone when they are deleted."""

import dataclasses
import errno
import json
import os

import peft
import pytest
import torch

import tests.tiny as tiny
from everlong.errors import ConfigurationError, InputError, MemoryStoreError, UnknownNameError
from everlong.memory import store as store_module
from everlong.memory.adapter import Adapter
from everlong.memory.pairs import Pair
from everlong.memory.progress import Progress
from everlong.memory.record import Recipe, Source
from everlong.memory.store import MemoryStore
from everlong.memory.unfinished import Unfinished
from tests.memory.adapters import IDS, PAIRS, content, logits_with, lora, record

# --- there and back ----------------------------------------------------------------------------------


def test_a_memory_comes_back_as_it_was(store):
    adapter = lora()
    added = store.add(record(), adapter, PAIRS)
    found = MemoryStore(store.folder).get("handbook")
    assert found == added and found.record == record(created=found.record.created)
    assert found.pairs() == PAIRS and found.name == "handbook"
    assert found.bytes == sum(map(len, content(found.path).values()))
    assert found.adapter().tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(tensor, adapter.tensors[key]) for key, tensor in found.adapter().tensors.items())
    assert store.list() == (found,) and store.broken() == ()


def test_plain_peft_loads_it_with_the_same_logits(kept):
    model = peft.PeftModel.from_pretrained(tiny.build("llama"), kept.get("handbook").path).eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits_with(lora()))


def test_its_folder_is_what_vllms_filesystem_resolver_looks_for(kept):
    folder = kept.folder / "handbook"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == "tiny"
    assert config["inference_mode"] and config["r"] == 8
    assert sorted(path.name for path in folder.iterdir()) == [
        *("adapter_config.json", "adapter_model.safetensors", "memory.json", "pairs.jsonl")
    ]


def test_a_record_is_the_same_after_it_was_read(store):
    made = record(recipe=Recipe("x", {"rates": (1, 2)}), recall={"all": 1})
    assert store.add(made, lora()).record == store.get("handbook").record == made


def test_the_adapter_that_was_given_stays_as_it_was(store):
    adapter = lora()
    store.add(record(), adapter)
    assert adapter.config.base_model_name_or_path is None and not adapter.config.inference_mode


def test_the_default_store_lies_under_everlong_home(monkeypatch, tmp_path):
    monkeypatch.setenv("EVERLONG_HOME", str(tmp_path))
    assert MemoryStore().folder == tmp_path / "memories"
    assert MemoryStore().list() == () and not list(tmp_path.iterdir())


def test_a_cartridge_is_kept_too(store):
    config = peft.CartridgeConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    tensors = {"prompt_embeddings": torch.randn(3, 64)}
    store.add(record("prefix", kind="cartridge", rank=None), Adapter(config, tensors))
    found = store.get("prefix").adapter()
    assert type(found.config) is peft.CartridgeConfig and found.config.num_virtual_tokens == 3
    assert torch.equal(found.tensors["prompt_embeddings"], tensors["prompt_embeddings"])
    with pytest.raises(InputError, match="of type CARTRIDGE, not LORA"):
        store.add(record("other"), Adapter(config, tensors))


# --- names -------------------------------------------------------------------------------------------

BAD_NAMES = [
    "",
    ".",
    "..",
    "../up",
    "a/b",
    "a\\b",
    "/tmp/x",
    ".hidden",
    "-x",
    "a b",
    "é",
    "x\0",
    "a\n",
    "con",
]
BAD_NAMES += ["nul.txt", "x.", "x.scratch", "x" * 101]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_are_no_portable_folder_names_are_refused(kept, name):
    before = content(kept.folder.parent)
    with pytest.raises(ConfigurationError, match="cannot name a memory"):
        record(name)
    with pytest.raises(ConfigurationError, match="cannot name a memory"):
        kept.rename("handbook", name)
    for use in (kept.get, kept.delete):
        with pytest.raises(UnknownNameError):
            use(name)
    assert content(kept.folder.parent) == before


def test_names_from_outside_do_not_reach_out_of_the_store(kept, tmp_path):
    outside = MemoryStore(tmp_path / "other")
    outside.add(record("secret"), lora())
    with pytest.raises(UnknownNameError):
        kept.delete("../other/secret")
    assert outside.get("secret")


@pytest.mark.parametrize("name", ["a", "Handbook-2.1_b", "0", "x" * 100, "console"])
def test_other_names_are_fine(name):
    assert record(name).name == name


def test_an_unknown_name_is_answered_with_near_ones(kept, tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean 'handbook'"):
        kept.get("handbok")
    with pytest.raises(UnknownNameError, match="there are none in"):
        MemoryStore(tmp_path / "empty").get("handbook")


def test_a_name_that_is_taken_is_refused_unless_it_is_to_be_replaced(kept):
    before = content(kept.folder)
    with pytest.raises(ConfigurationError, match="there is a memory 'handbook' already"):
        kept.add(record(), lora(1))
    assert content(kept.folder) == before
    kept.add(record(segments=7), lora(1), replace=True)
    memory = kept.get("handbook")
    assert memory.record.segments == 7 and memory.pairs() == []
    assert torch.equal(logits_with(memory.adapter()), logits_with(lora(1)))
    assert [path.name for path in kept.folder.iterdir() if path.name[0] != "."] == ["handbook"]


def test_new_weights_get_a_new_folder(kept):
    with open(kept.folder / "handbook" / "adapter_model.safetensors", "rb") as reading:
        before = os.stat(kept.folder / "handbook").st_ino
        kept.add(record(), lora(1), replace=True)
        assert os.stat(kept.folder / "handbook").st_ino != before
        assert reading.read() != (kept.folder / "handbook" / "adapter_model.safetensors").read_bytes()


def test_names_that_differ_by_case_only_are_refused(kept):
    for replace in (False, True):
        with pytest.raises(ConfigurationError, match="upper and lower case only"):
            kept.add(record("HandBook"), lora(), replace=replace)


def test_a_folder_of_something_else_is_neither_listed_nor_replaced_nor_deleted(kept):
    other = kept.folder / "photos"
    other.mkdir()
    (other / "me.jpg").write_bytes(b"me")
    with pytest.raises(ConfigurationError, match="something else than a memory"):
        kept.add(record("photos"), lora(), replace=True)
    with pytest.raises(UnknownNameError):
        kept.delete("photos")
    assert kept.reset() == 1 and (other / "me.jpg").read_bytes() == b"me"


# --- what is no memory -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adapter, reason",
    [
        (lora(r=4), "rank is 4, not one of 8, 16, 32, 64, 128"),
        (lora(use_dora=True), "it sets use_dora"),
        (lora(bias="all"), "biases"),
        (lora(rank_pattern={"v_proj": 16}), "rank_pattern"),
    ],
    ids=["rank", "dora", "bias", "ranks"],
)
def test_what_servers_do_not_load_is_not_kept(store, adapter, reason):
    with pytest.raises(InputError, match=reason):
        store.add(record(rank=adapter.config.r), adapter)
    assert not store.folder.exists()


def test_weights_that_are_not_finite_are_not_kept(store):
    adapter = lora()
    next(iter(adapter.tensors.values()))[0, 0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        store.add(record(), adapter)


def test_a_record_that_contradicts_the_adapter_is_refused(store):
    with pytest.raises(ConfigurationError, match="has rank 16, the adapter 8"):
        store.add(record(rank=16), lora())


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "prefix"},
        {"rank": None},
        {"kind": "cartridge"},
        {"segments": "1"},
        {"recall": {"questions": "most"}},
        {"recall": {"questions": float("nan")}},
        {"recipe": Recipe("x", {"path": os})},
        {"source": {"sha256": ""}},
        {"seconds": True},
    ],
    ids=str,
)
def test_records_that_say_nonsense_are_refused(changes):
    with pytest.raises(ConfigurationError, match="handbook"):
        record(**changes)


def test_a_source_is_told_by_its_bytes():
    source = Source.of("Orla — née Finch", 9)
    assert source.characters == 16 and source.tokens == 9
    assert source.sha256 != Source.of("Orla – née Finch", 9).sha256 and len(source.sha256) == 64
    assert Source.of("\ud800", 1).characters == 1


# --- changes -----------------------------------------------------------------------------------------


def test_updating_writes_what_was_measured_and_leaves_the_weights(kept):
    before = content(kept.folder)
    memory = kept.get("handbook")
    changed = kept.update(dataclasses.replace(memory.record, recall={"questions": 0.9}))
    assert kept.get("handbook") == changed and changed.record.recall == {"questions": 0.9}
    after = content(kept.folder)
    assert {name for name in before if before[name] != after[name]} == {"handbook/memory.json"}
    kept.update(changed.record, PAIRS[:1])
    assert kept.get("handbook").pairs() == PAIRS[:1]


@pytest.mark.parametrize("changes", [{"rank": 16}, {"base_hash": "1" * 64}, {"base_model": "other"}], ids=str)
def test_other_weights_are_another_memory(kept, changes):
    with pytest.raises(ConfigurationError, match="cannot be changed"):
        kept.update(record(**changes))


def test_renaming(kept):
    old = kept.get("handbook")
    new = kept.rename("handbook", "manual")
    assert new == kept.get("manual") and new.record == dataclasses.replace(old.record, name="manual")
    assert json.loads((new.path / "memory.json").read_text())["name"] == "manual"
    assert [memory.name for memory in kept.list()] == ["manual"]
    kept.add(record("other"), lora())
    with pytest.raises(ConfigurationError, match="already"):
        kept.rename("other", "manual")
    assert len(kept.list()) == 2


def test_a_folder_that_was_copied_by_hand_goes_by_its_own_name(kept):
    os.rename(kept.folder / "handbook", kept.folder / "moved")
    assert kept.get("moved").name == "moved"


def test_deleting_leaves_nothing(kept):
    held = kept.get("handbook").bytes
    assert kept.delete("handbook") == held
    assert content(kept.folder) == {} and not [p for p in kept.folder.iterdir() if p.name != ".lock"]
    with pytest.raises(UnknownNameError):
        kept.delete("handbook")


def test_deleting_a_link_leaves_what_it_points_to(kept, tmp_path):
    os.rename(kept.folder / "handbook", tmp_path / "elsewhere")
    (kept.folder / "handbook").symlink_to(tmp_path / "elsewhere")
    assert kept.get("handbook").name == "handbook"
    assert kept.delete("handbook") == 0 and kept.list() == ()
    assert (tmp_path / "elsewhere" / "memory.json").is_file()


def test_deleting_that_fails_says_so(kept, monkeypatch):
    def fail(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(store_module, "erase", fail)
    with pytest.raises(MemoryStoreError, match="cannot delete memory 'handbook'.*Permission denied.*by hand"):
        kept.delete("handbook")
    monkeypatch.undo()
    kept.add(record("other"), lora())
    assert {name.split("/")[0] for name in content(kept.folder)} == {"other"}


def test_reset_deletes_all(kept):
    kept.add(record("other"), lora())
    (kept.folder / "other" / "memory.json").write_text("{")
    Unfinished(kept.folder, "a text").save(Progress(segment=1))
    assert kept.reset() == 2 and content(kept.folder) == {} and kept.reset() == 0
    assert Unfinished(kept.folder, "a text").load() is None


def test_export_copies_the_folder(kept, tmp_path):
    target = kept.export("handbook", tmp_path / "deep" / "copy")
    assert content(target) == content(kept.folder / "handbook")
    with pytest.raises(ConfigurationError, match="exists: name a folder that does not"):
        kept.export("handbook", target)
    assert [path.name for path in target.parent.iterdir()] == ["copy"]


def test_search_finds_the_memory_whose_pairs_share_the_words(kept):
    kept.add(record("harbour"), lora(1), [Pair("Who tends the lighthouse?", " Tomas", "questions")])
    kept.add(record("silent"), lora(2))
    ranked = kept.search("Where does Orla keep her bees?")
    assert [memory.name for memory, _ in ranked] == ["handbook"] and ranked[0][1] > 0
    assert [memory.name for memory, _ in kept.search("the lighthouse")] == ["harbour", "handbook"]
    assert [memory.name for memory, _ in kept.search("the lighthouse", 1)] == ["harbour"]
    assert kept.search("quantum") == ()
