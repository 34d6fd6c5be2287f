"""A text becomes a memory in a store; what is interrupted goes on; what cannot be is refused."""

import pytest
import torch

from everlong import LLM, FullAttention
from everlong.errors import ConfigurationError, InputError, MemoryStoreError, UnknownNameError
from everlong.memory import unfinished
from everlong.memory.memorize import memorize
from everlong.memory.progress import Progress
from everlong.memory.recipes import Recipe, make_recipe
from everlong.memory.unfinished import Unfinished
from tests import tiny
from tests.memory.adapters import content
from tests.memory.test_infinite_icl import TEXT, recipe_of

FAST = recipe_of(passes=2)


@pytest.fixture
def llm():
    model, tokenizer = tiny.byte_llama()
    with LLM(model, tokenizer, "tiny", FullAttention()) as made:
        yield made


class Interrupted(Exception):
    """Stands for Ctrl-C."""


def stop_at(segment):
    def progress(at):
        if at.segment == segment:
            raise Interrupted

    return progress


def test_a_text_becomes_a_memory_that_sessions_use(llm, store):
    before = llm.session()
    memory = llm.memorize(TEXT, "bees", recipe_of(passes=30), store=store)
    assert [found.name for found in store.list()] == ["bees"]
    record = memory.record
    assert (record.base_model, record.base_hash) == ("tiny", llm._attached.weights_hash)
    assert record.segments == 3 and record.source.characters == len(TEXT) and record.seconds > 0
    assert record.recipe.values["passes"] == 30
    assert len(memory.pairs()) == record.segments
    with_it = llm.session(memories=["bees"], store=store)
    assert with_it.score(TEXT).nll < before.score(TEXT).nll - 1
    assert not list((store.folder / ".unfinished").glob("*/segment-*"))


def test_interrupted_it_goes_on_from_the_last_whole_segment(llm, store, tmp_path):
    whole = llm.memorize(TEXT, "whole", FAST, store=store)
    with pytest.raises(Interrupted):
        llm.memorize(TEXT, "parts", FAST, store=store, progress=stop_at(2))
    begun = []
    parts = llm.memorize(TEXT, "parts", FAST, store=store, progress=lambda at: begun.append(at.segment))
    assert min(begun) == 2
    ours, theirs = parts.adapter().tensors, whole.adapter().tensors
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert parts.pairs() == whole.pairs()


@pytest.mark.parametrize("changes", [{"text": TEXT + " More."}, {"seed": 1}, {"passes": 3}])
def test_what_differs_in_anything_is_learned_from_the_beginning(changes, llm, store):
    with pytest.raises(Interrupted):
        llm.memorize(TEXT, "bees", FAST, store=store, progress=stop_at(2))
    begun = []
    text, seed = changes.pop("text", TEXT), changes.pop("seed", 0)
    llm.memorize(
        text, "bees", FAST, seed=seed, store=store, progress=lambda at: begun.append(at.segment), **changes
    )
    assert min(begun) == 0


def test_what_was_saved_and_is_damaged_is_learned_again(llm, store):
    with pytest.raises(Interrupted):
        llm.memorize(TEXT, "bees", FAST, store=store, progress=stop_at(2))
    (state,) = (store.folder / ".unfinished").glob("*/segment-2/state.json")
    state.write_text("{")
    begun = []
    llm.memorize(TEXT, "bees", FAST, store=store, progress=lambda at: begun.append(at.segment))
    assert min(begun) == 0


def test_two_processes_that_learn_the_same_do_not_disturb_each_other(store):
    stops = []
    saved = [Unfinished(store.folder, "a text") for _ in range(2)]
    for number in (0, 1):
        for one in saved:
            one.save(Progress(segment=number))
            stops.append(one.load().segment)
    saved[0].save(Progress(segment=2))
    saved[1].save(Progress(segment=1))
    assert [*stops, saved[1].load().segment] == [0, 0, 1, 1, 2], "what is ahead stays"
    assert len(list(saved[0].folder.glob("segment-*"))) == 2
    saved[0].discard()
    saved[1].save(Progress(segment=2))
    assert saved[0].load().segment == 2


def test_a_full_disk_is_explained_and_what_was_saved_stays(llm, store, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with pytest.raises(Interrupted):
        llm.memorize(TEXT, "bees", FAST, store=store, progress=stop_at(1))
    before = content(store.folder)
    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "save_file", full)
        with pytest.raises(MemoryStoreError, match="free some space"):
            llm.memorize(TEXT, "bees", FAST, store=store)
    assert content(store.folder) == before
    assert llm.memorize(TEXT, "bees", FAST, store=store).record.segments == 3


def test_a_name_that_exists_is_refused_before_anything_is_learned(llm, store):
    llm.memorize(TEXT, "bees", FAST, store=store)
    called = []
    with pytest.raises(ConfigurationError, match="there is a memory 'bees' already"):
        llm.memorize(TEXT, "bees", FAST, store=store, progress=called.append)
    assert not called
    again = llm.memorize(TEXT[:60], "bees", FAST, store=store, replace=True)
    assert again.record.source.characters == 60


def test_what_is_no_text_is_refused(llm, store):
    with pytest.raises(InputError, match="from text, not from token ids"):
        llm.memorize([1, 2, 3], "bees", FAST, store=store)
    with pytest.raises(InputError, match="empty"):
        llm.memorize("", "bees", FAST, store=store)
    with pytest.raises(UnknownNameError, match="unknown recipe 'infinite'"):
        llm.memorize(TEXT, "bees", "infinite", store=store)
    with pytest.raises(UnknownNameError, match="did you mean 'passes'"):
        llm.memorize(TEXT, "bees", store=store, pases=3)


def test_sessions_with_memories_are_as_before_after_something_else_was_learned(llm, store):
    llm.memorize(TEXT, "bees", FAST, store=store)
    session = llm.session(memories=["bees"], store=store)
    before = session.score(TEXT).nll
    llm.memorize("Boats. " * 8, "boats", FAST, store=store)
    assert session.score(TEXT).nll == pytest.approx(before, abs=1e-5)


def test_one_adapter_a_segment_ends_as_one_memory(llm, store):
    memory = llm.memorize(TEXT, "bees", FAST, carry="separate", store=store)
    assert memory.record.segments == 3 and memory.record.rank == 32  # three of rank 8


def test_settings_may_come_as_text():
    made = make_recipe(
        "infinite-icl", passes="4", budget="none", generators="cloze, text", learning_rate="1e-4"
    )
    assert made == Recipe(passes=4, generators=("cloze", "text"), learning_rate=1e-4)
    with pytest.raises(ConfigurationError, match="must be a number"):
        make_recipe("infinite-icl", passes="four")


def test_memorize_is_what_the_facade_calls(llm, store):
    assert memorize(llm._attached, TEXT, "bees", store=store, recipe=FAST).record.recipe.name == "custom"
