"""What leaves the window while a session reads is learned: each sentence once, whatever comes in between."""

import pytest
import torch

from everlong import FullAttention, Learning, LMInfinite, MemoryStore, StreamingLLM
from everlong.errors import (
    ConfigurationError,
    MemoryGateError,
    MemoryStoreError,
    NumericalError,
    StateError,
)
from everlong.memory import infinite_icl, routing, segments
from everlong.memory.infinite_icl import InfiniteICL
from everlong.memory.recipes import make_recipe
from everlong.memory.routing import Routing
from everlong.reading.session import Session
from tests.memory.test_infinite_icl import recipe_of
from tests.reading.conftest import make_llm, next_logits

FAST = recipe_of(passes=1)
SINKS, WINDOW = 4, 40
STREAMING = StreamingLLM(sinks=SINKS, window=WINDOW)
TEXT = (
    "Orla Finch keeps bees in Sligo. She sells honey to Bennet. The bees sleep until May. "
    "Nobody has seen the queen. It rains there every Monday. Her brother paints boats. "
    "Übermut 🙂 naïve café. Then it snowed. The boats are blue. He sold one in June. "
)


@pytest.fixture(autouse=True)
def _bytes_are_tokens(monkeypatch):
    monkeypatch.setattr(segments, "_SHATTERED", 10.0)


@pytest.fixture
def llm():
    with make_llm(LMInfinite(sinks=SINKS, window=WINDOW), chat=False) as made:
        yield made


@pytest.fixture
def learned(monkeypatch):
    """The texts of all segments, as they were learned."""
    found = []
    learn = InfiniteICL.learn_segments

    def watched(self, parts, **rest):
        outcome = learn(self, parts, **rest)
        found.extend("".join(part.sentences) for part in parts)
        return outcome

    monkeypatch.setattr(InfiniteICL, "learn_segments", watched)
    return found


def bees(store, **changes):
    return Learning(**{"name": "bees", "recipe": FAST, "store": store, **changes})


def waiting(session):
    """What left the window and is in no whole segment yet."""
    state = session._learner._cutter.state()
    return "".join(sentence for sentence, _ in state["held"]) + state["rest"]


def same(ours, theirs):
    a, b = ours.adapter().tensors, theirs.adapter().tensors
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("policy", [None, STREAMING], ids=["lm-infinite", "streaming-llm"])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_what_is_learned_is_what_left_the_window(llm, store, learned, chunk, policy):
    session = llm.session(policy, chunk=chunk)
    report = session.read(TEXT, memorize=bees(store))
    seen = session._tape.driver.cache.seen
    left = TEXT.encode()[: seen - (WINDOW - SINKS)].decode(errors="ignore")
    assert "".join(learned) + waiting(session) == left
    assert len(learned) >= 3 and all(piece.endswith((". ", "! ")) for piece in learned)
    assert report.learned.segments == len(learned) and report.learned.name == "bees"
    assert report.learned.waiting == len(waiting(session).encode())
    session.memorize()
    assert "".join(learned) == TEXT and waiting(session) == ""
    assert store.get("bees").record.segments == len(learned)


def test_it_grows_over_several_reads_and_plain_ones_are_not_learned(llm, store, learned):
    session = llm.session()
    for piece in (TEXT[:50], TEXT[50:53], TEXT[53:]):
        session.read(piece, memorize=bees(store))
    known = len(learned)
    session.read("This is not to be learned. " * 6)
    assert len(learned) == known  # it waits
    session.read(TEXT, memorize=True)
    assert "".join(learned).startswith(TEXT[:200]) and "not to be" not in "".join(learned)
    session.memorize()
    assert "".join(learned) == f"{TEXT}\n\n{TEXT}"
    assert [memory.name for memory in store.list()] == ["bees"]


def test_questions_and_answers_that_are_kept_are_not_learned(store, learned):
    with make_llm(LMInfinite(sinks=SINKS, window=WINDOW)) as llm:
        session = llm.session(system="Be terse.")
        session.read(TEXT, memorize=bees(store))
        session.ask("Who keeps them?", keep=True, max_new_tokens=5)
        session.read(TEXT, memorize=True)
        session.memorize()
    assert "".join(learned) == f"{TEXT}\n\n{TEXT}"


def test_what_is_pinned_is_not_learned(llm, store, learned):
    session = llm.session()
    session.pin("Be terse.")
    session.read(TEXT, memorize=bees(store))
    session.memorize()
    assert "".join(learned) == TEXT


def test_token_ids_are_learned_too(llm, store, learned):
    session = llm.session()
    session.read(list(TEXT.encode()), memorize=bees(store))
    session.memorize()
    assert "".join(learned) == TEXT


@pytest.mark.parametrize("carry", ["carried", "replay", "separate"])
def test_the_memory_is_what_memorize_makes_of_the_text(llm, store, carry):
    recipe = make_recipe(FAST, carry=carry)
    session = llm.session(chunk=30, store=store)
    session.read(TEXT, memorize=bees(None, recipe=recipe))
    session.memorize()
    ours, theirs = store.get("bees"), llm.memorize(TEXT, "whole", recipe, store=store)
    assert same(ours, theirs) and ours.pairs() == theirs.pairs()
    for field in ("segments", "rank", "base_hash", "recipe"):
        assert getattr(ours.record, field) == getattr(theirs.record, field)
    assert ours.record.source.tokens == theirs.record.source.tokens


def test_the_session_knows_it_by_heart(llm, store):
    recipe = recipe_of(passes=30)
    session = llm.session(store=store)
    assert session.memories is None
    session.read(TEXT, memorize=bees(None, recipe=recipe))
    session.memorize()
    assert session.memories.names == ("bees",)
    beside = llm.session(memories=["bees"], store=store)
    first = TEXT[:60]
    bare = llm.session().score(first).nll
    assert beside.score(first).nll < bare - 1
    session.reset()
    assert session.score(first).nll == pytest.approx(beside.score(first).nll, abs=1e-5)


def test_it_is_known_beside_the_memories_the_session_was_begun_with(llm, store):
    llm.memorize("Boats are red. They float. ", "boats", FAST, store=store)
    session = llm.session(memories=["boats"], memory_weights=[0.5], store=store)
    session.read(TEXT, memorize=bees(None))
    session.memorize()
    assert session.memories.names == ("boats", "bees") and session.memories.weights == (0.5, 1.0)
    session.reset()
    both = llm.session(memories=["boats", "bees"], memory_weights=[0.5, 1], store=store)
    for each in (session, both):
        each.read(TEXT[:30])
    assert torch.allclose(next_logits(session), next_logits(both), atol=1e-4)


def test_a_fork_keeps_what_was_known_and_learns_into_a_memory_of_its_own(llm, store):
    session = llm.session(store=store)
    session.read(TEXT[:150], memorize=bees(None))
    fork = session.fork()
    before = next_logits(fork)
    session.read(TEXT, memorize=True)
    assert session.memories != fork.memories and torch.equal(next_logits(fork), before)
    with pytest.raises(StateError, match="nothing to learn"):
        fork.memorize()
    with pytest.raises(ConfigurationError, match="there is a memory 'bees' already"):
        fork.read(TEXT, memorize="bees")
    fork.read(TEXT, memorize=Learning("other", FAST))
    assert fork.memories.names == ("bees", "other")


def test_adapters_that_nobody_uses_any_more_go(llm, store):
    session = llm.session()
    session.read(TEXT * 3, memorize=bees(store))
    assert session._learner.report().segments > 8
    assert len(llm.handle.adapters) <= 3


# --- save and restore -------------------------------------------------------------------------------


def test_a_restored_session_goes_on_learning_as_it_would_have(llm, store, tmp_path, learned):
    whole = llm.session()
    whole.read(TEXT + TEXT, memorize=bees(store, name="whole"))
    whole.memorize()
    expected = list(learned)
    learned.clear()
    session = llm.session(store=store)
    session.read(TEXT[:170], memorize=bees(None))
    session.save(tmp_path / "a.state")
    before, known = next_logits(session), list(learned)
    session.read(TEXT, memorize=True)  # the store moves on
    del learned[len(known) :]
    restored = llm.restore(tmp_path / "a.state", store=store)
    assert restored.memories.names == ("bees",) and torch.equal(next_logits(restored), before)
    restored.read(TEXT[170:] + TEXT, memorize=True)
    restored.memorize()
    assert learned == expected
    assert same(store.get("bees"), store.get("whole"))
    assert store.get("bees").record.created == session._learner._created


def test_a_session_saved_before_its_memory_was_kept_learns_it_again(llm, store, tmp_path):
    session = llm.session(store=store)
    session.read(TEXT[:80], memorize=bees(None))
    session.save(tmp_path / "a.state")
    assert not store.list()
    session.read(TEXT, memorize=True)
    restored = llm.restore(tmp_path / "a.state", store=store)
    restored.read(TEXT[80:150], memorize=True)
    assert store.get("bees").record.segments == restored._learner.report().segments


def test_a_session_that_learned_is_restored_by_its_llm_alone(llm, store, tmp_path):
    session = llm.session(store=store)
    session.read(TEXT, memorize=bees(None))
    session.save(tmp_path / "a.state")
    with pytest.raises(StateError, match=r"llm\.restore\(\)"):
        Session.restore(llm._attached, tmp_path / "a.state")


def test_a_fork_is_saved_with_what_it_knew(llm, store, tmp_path):
    llm.memorize("Boats are red. They float. ", "boats", FAST, store=store)
    session = llm.session(memories=["boats"], memory_weights=[0.5], store=store)
    session.read(TEXT, memorize=bees(None))
    fork = session.fork()
    fork.save(tmp_path / "a.state")
    restored = llm.restore(tmp_path / "a.state", store=store)
    assert restored.memories == fork.memories
    assert torch.allclose(next_logits(restored), next_logits(fork), atol=1e-4)
    session.read(TEXT, memorize=True)
    with pytest.raises(StateError, match="other memories than those now named boats, bees"):
        llm.restore(tmp_path / "a.state", store=store)


def test_what_was_learned_in_passing_can_be_chosen_and_that_is_restored(llm, store, tmp_path, monkeypatch):
    monkeypatch.setattr(Routing, "is_surer", lambda *_: True)
    monkeypatch.setattr(routing, "LEAST_LIKENESS", 0.0)
    question = "Who keeps bees in Sligo?"
    learning, choosing = llm.session(store=store), llm.session(memories="auto", store=store)
    learning.read(TEXT, memorize=bees(None))
    assert choosing.ask(question, max_new_tokens=2).memories == ()  # from what was there when it began
    choosing = llm.session(memories="auto", store=store)
    choosing.chat(question, max_new_tokens=2)
    for number, session in enumerate((learning, choosing)):
        session.save(tmp_path / f"{number}.state")
    known, expected = learning.memories, [s.ask(question, max_new_tokens=4) for s in (learning, choosing)]
    learning, choosing = (llm.restore(tmp_path / f"{n}.state", store=store) for n in range(2))
    assert learning.memories == known and choosing.memories.names == ("auto",)
    for session, before in zip((learning, choosing), expected, strict=True):
        answer = session.ask(question, max_new_tokens=4)
        assert answer.text == before.text and answer.memories == before.memories == ("bees",)
    learning.read(TEXT, memorize=True)  # the store moves on; what was chosen goes on as it was
    choosing.read("It rains. ")
    assert choosing.ask(question, max_new_tokens=2).memories == ("bees",)


# --- interruptions and errors -----------------------------------------------------------------------


def test_interrupted_learning_is_done_later_and_the_session_stays_usable(llm, store, learned):
    class Interrupted(Exception):
        """Stands for Ctrl-C."""

    def stop(at):
        if (at.segment, at.stage) == (1, "learn"):
            raise Interrupted

    session = llm.session(chunk=16)
    with pytest.raises(Interrupted):
        session.read(TEXT, memorize=bees(store), learn_progress=stop)
    assert session.memories.names == ("bees",) and len(learned) == 1
    assert session.generate(3).tokens == 3
    assert session.stats.tokens_read == len(TEXT.encode())  # what was taken stays read
    session.read(" It ends. ", memorize=True)
    session.memorize()
    written = "".join(learned)
    assert written.startswith(TEXT[:100]) and written.count("Her brother") == 1


def test_a_full_disk_loses_nothing(llm, store, monkeypatch):
    session = llm.session(chunk=16)
    with monkeypatch.context() as patch:

        def full(*_args, **_kwargs):
            raise MemoryStoreError("cannot keep memory 'bees': free some space")

        patch.setattr(MemoryStore, "add", full)
        with pytest.raises(MemoryStoreError):
            session.read(TEXT, memorize=bees(store))
    assert session.memories.names == ("bees",) and not store.list()
    session.read("More. ", memorize=True)
    assert store.get("bees").record.segments >= 1


def test_the_gate_stops_at_the_first_segment_and_leaves_out_later_ones(llm, store, learned, monkeypatch):
    recipe = make_recipe(FAST, selection="gain")
    refuses = iter([True])

    def gated(_worth, _segment):
        if next(refuses, False):
            raise MemoryGateError("it is worth nothing; force it")
        return set()

    monkeypatch.setattr(infinite_icl, "without_worth", gated)
    session = llm.session(chunk=16)
    with pytest.raises(MemoryGateError, match="worth nothing"):
        session.read(TEXT, memorize=bees(store, recipe=recipe))
    session.read("It goes on. ")
    refuses = iter([False, True])
    with pytest.warns(UserWarning, match="'bees' leaves a segment out: it is worth nothing"):
        session.read("It goes on. ", memorize=bees(store, recipe=recipe))
    assert session.memories.names == ("bees",)
    assert "".join(learned).startswith(TEXT[:30])


def test_a_loss_that_is_not_finite_stops_and_the_session_goes_on(llm, store, monkeypatch):
    def broken(*_args, **_kwargs):
        raise NumericalError("the loss of step 1 is not finite")

    session = llm.session()
    with monkeypatch.context() as patch:
        patch.setattr(infinite_icl, "consolidate", broken)
        with pytest.raises(NumericalError):
            session.read(TEXT, memorize=bees(store))
    assert session.memories is None and session.generate(2).tokens == 2
    session.read("More. ", memorize=True)
    assert session.memories.names == ("bees",)


def test_a_policy_without_a_window_is_refused(llm, store):
    with pytest.raises(ConfigurationError, match=r"FullAttention nothing ever leaves.*llm\.memorize\(\)"):
        llm.session(FullAttention()).read(TEXT, memorize=bees(store))


def test_a_session_that_chooses_or_begins_with_a_cartridge_learns_nothing_in_passing(llm, store):
    llm.memorize("Boats are red. They float. ", "boats", FAST, store=store)
    llm.memorize("Boats are red. They float. ", "keys", recipe_of(kind="cartridge", passes=1), store=store)
    for memories, reason in (("auto", "chooses a memory for each answer"), (["keys"], r"cartridge \(keys\)")):
        session = llm.session(memories=memories, store=store)
        with pytest.raises(ConfigurationError, match=f"memorize: this session.*{reason}"):
            session.read(TEXT, memorize=bees(store))
        assert session.stats.tokens_read == 0
        assert session.read(TEXT).learned is None
    with pytest.raises(ConfigurationError, match="a cartridge is not learned in passing"):
        Learning("bees", "cartridge")


def test_names_that_are_taken_are_refused_before_anything_is_read(llm, store):
    llm.memorize("Boats are red. ", "bees", FAST, store=store)
    session = llm.session(store=store)
    with pytest.raises(ConfigurationError, match="there is a memory 'bees' already"):
        session.read(TEXT, memorize="bees")
    assert session.stats.tokens_read == 0
    session.read(TEXT, memorize=bees(None, replace=True))
    assert store.get("bees").record.source.characters > 20


def test_a_session_learns_into_one_memory_in_one_way(llm, store, tmp_path):
    session = llm.session(store=store)
    session.read(TEXT, memorize=bees(None))
    with pytest.raises(ConfigurationError, match="into memory 'bees' already"):
        session.read(TEXT, memorize="boats")
    with pytest.raises(ConfigurationError, match="into memory 'bees' already"):
        session.read(TEXT, memorize=bees(MemoryStore(tmp_path / "elsewhere")))
    with pytest.raises(ConfigurationError, match="another recipe or seed"):
        session.read(TEXT, memorize=bees(None, seed=1))
    session.read(TEXT, memorize="bees")


def test_a_memory_that_became_another_is_not_written_over(llm, store):
    session = llm.session(store=store)
    session.read(TEXT, memorize=bees(None))
    other = llm.memorize("Boats are red. ", "bees", FAST, store=store, replace=True)
    with pytest.raises(ConfigurationError, match="'bees' is another one now"):
        session.read(TEXT, memorize=True)
    assert store.get("bees").record == other.record
    store.rename("bees", "boats")
    session.read("More. ", memorize=True)
    assert store.get("bees").record.segments > 1


def test_odd_arguments_are_refused(llm, store):
    session = llm.session(store=store)
    with pytest.raises(ConfigurationError, match="memorize=3 is neither"):
        session.read(TEXT, memorize=3)
    with pytest.raises(ConfigurationError, match="cannot name a memory"):
        session.read(TEXT, memorize="a/b")
    with pytest.raises(StateError, match="memorize=True"):
        session.memorize()
    with pytest.raises(StateError, match=r"llm\.session\(\)"):
        Session(llm._attached).read(TEXT, memorize=True)
    with pytest.raises(ConfigurationError, match="unknown recipe"):
        Learning("bees", "infinite")


def test_true_names_it_after_the_file(llm, store, tmp_path):
    file = tmp_path / "My novel (1813).txt"
    file.write_text(TEXT)
    for name in ("My-novel-1813", "My-novel-1813-2"):
        session = llm.session(store=store)
        report = session.read(file, memorize=Learning(recipe=FAST))
        assert report.learned.name == name and store.get(name)
    assert llm.session(store=store).read("Too short.", memorize=True).learned.name == "session"
    chosen = tmp_path / "auto.txt"
    chosen.write_text("Too short.")
    assert llm.session(store=store).read(chosen, memorize=True).learned.name == "auto-2"
