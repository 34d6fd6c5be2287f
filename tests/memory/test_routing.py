"""Sessions that choose a memory for each question: the right one, or the base model, and what each reads."""

import math

import pytest
import torch

from everlong import LLM, FullAttention, LMInfinite
from everlong.errors import ConfigurationError, MemoryStoreError, UnknownNameError
from everlong.memory import routing
from everlong.memory.lexical import LexicalIndex
from everlong.memory.pairs import Pair
from everlong.memory.routing import Routing, entropy
from everlong.models.fingerprint import weights_hash
from tests import tiny
from tests.memory.adapters import adapter_of, lora, record
from tests.reading.conftest import ids_of, next_logits

BEES = [Pair("Who keeps the bees?", " Orla Finch", "questions"), Pair("Orla sells", " honey.", "cloze")]
BOATS = [Pair("Who paints the boats?", " Bennet Crane", "questions"), Pair("A boat", " is red.", "cloze")]
ABOUT_BEES, ABOUT_BOATS = "Where does Orla Finch sell honey?", "What colour are the boats of Bennet Crane?"
UNRELATED = "What is the capital of France?"
TEXT = "It rained all night in Sligo. "


@pytest.fixture
def model():
    return tiny.byte_llama()[0]


@pytest.fixture
def stocked(store, model):
    """A store with two memories of the model, and one of another."""
    made = weights_hash(model)
    for seed, (name, pairs) in enumerate({"bees": BEES, "boats": BOATS}.items()):
        store.add(record(name, base_hash=made, rank=8), adapter_of(model, seed), pairs)
    store.add(record("strange", base_model="other"), lora(), [Pair(UNRELATED, " Paris", "questions")])
    return store


@pytest.fixture(params=[True, False], ids=["template", "running text"])
def llm(model, request):
    tokenizer = tiny.byte_tokenizer()
    if not request.param:
        tokenizer.chat_template = None
    with LLM(model, tokenizer, "tiny", FullAttention()) as made:
        yield made


@pytest.fixture
def surer(monkeypatch):
    """Every memory makes the model surer."""
    monkeypatch.setattr(Routing, "is_surer", lambda *_: True)


@pytest.fixture
def forwards(llm, monkeypatch):
    """The adapter of each forward."""
    real, used = llm.handle.adapters.begin, []

    def begin(spans):
        used.extend(name for name, _ in spans)
        real(spans)

    monkeypatch.setattr(llm.handle.adapters, "begin", begin)
    return used


@pytest.mark.usefixtures("surer")
def test_the_memory_that_is_like_the_question_answers_and_the_base_model_what_is_like_none(llm, stocked):
    session = llm.session(memories="auto", store=stocked)
    for question, names in ((ABOUT_BEES, ["bees"]), (ABOUT_BOATS, ["boats"]), (UNRELATED, [])):
        answer = session.ask(question, max_new_tokens=8)
        by_hand = llm.session(memories=names, store=stocked).ask(question, max_new_tokens=8)
        assert answer.memories == by_hand.memories == tuple(names)
        assert answer.text == by_hand.text and answer.tokens == by_hand.tokens


@pytest.mark.usefixtures("surer")
def test_only_what_waits_when_the_model_is_to_write_is_read_with_the_memory(llm, stocked, forwards):
    bees = llm.session(memories=["bees"], store=stocked).memories
    session, bare = llm.session(memories="auto", store=stocked, chunk=16), llm.session(chunk=16)
    for each in (session, bare):
        each.read(TEXT * 12)
    assert set(forwards) == {None}
    forwards.clear()
    session.ask(ABOUT_BEES, max_new_tokens=4)
    assert set(forwards) == {None, bees.adapter} and set(forwards[-3:]) == {bees.adapter}
    assert torch.equal(next_logits(session), next_logits(bare))
    session.chat(ABOUT_BEES, max_new_tokens=4)
    forwards.clear()
    session.read(TEXT * 12)
    session.score("Sligo")
    assert set(forwards) == {None}
    forwards.clear()
    assert session.chat(UNRELATED, max_new_tokens=4).memories == () and set(forwards) == {None}


@pytest.mark.usefixtures("surer")
def test_what_is_kept_stays_and_the_next_question_is_another(llm, stocked, forwards):
    session, by_hand = (llm.session(memories=names, store=stocked) for names in ("auto", ["bees"]))
    for each in (session, by_hand):
        assert each.chat(ABOUT_BEES, max_new_tokens=4).memories == ("bees",)
    assert ids_of(session) == ids_of(by_hand) and session.stats.tokens_written == 4
    forwards.clear()
    assert session.chat(UNRELATED, max_new_tokens=4).memories == () and set(forwards) == {None}
    assert session.stats.tokens_written == 8


def test_where_the_memory_makes_the_model_no_surer_the_base_model_answers(llm, stocked, monkeypatch):
    monkeypatch.setattr(Routing, "is_surer", lambda *_: False)
    answer = llm.session(memories="auto", store=stocked).ask(ABOUT_BEES, max_new_tokens=8)
    assert answer.memories == () and answer.text == llm.session().ask(ABOUT_BEES, max_new_tokens=8).text


@pytest.mark.parametrize("keep", [False, True])
def test_the_gate_compares_the_entropy_of_the_first_token(llm, stocked, monkeypatch, keep):
    def first(names):
        tape = llm.session(memories=names, store=stocked).to_answer(ABOUT_BEES, keep=True)
        tape.run_all(64, logits=True)
        return entropy(tape.driver.logits)

    ratio = first(["bees"]) / first([])
    for limit, names in ((ratio * 1.01, ("bees",)), (ratio * 0.99, ())):
        monkeypatch.setattr(routing, "SURER", limit)
        session = llm.session(memories="auto", store=stocked)
        assert session.ask(ABOUT_BEES, keep=keep, max_new_tokens=4).memories == names


def test_entropy_and_who_is_surer(llm, stocked):
    even, sharp = torch.zeros(8), torch.tensor([9.0, *[0.0] * 7])
    assert entropy(even) == pytest.approx(math.log(8)) and entropy(sharp) < 0.02
    assert entropy(torch.tensor([0.0, -math.inf])) == 0
    router = llm.session(memories="auto", store=stocked).memories
    assert router.is_surer(sharp, even) and not router.is_surer(even, sharp)
    assert not router.is_surer(even, even) and not router.is_surer(even, even * 1.1)


@pytest.mark.usefixtures("surer")
def test_going_on_is_about_the_last_words(llm, stocked):
    session = llm.session(memories="auto", store=stocked)
    session.read("Of the bees that Orla Finch keeps")
    result = session.generate(5)
    assert result.memories == ("bees",)
    session.read("\n\n" + "The capital of France is another thing altogether. " * 3)
    assert session.generate(5).memories == ()


@pytest.mark.usefixtures("surer")
def test_a_list_that_begins_with_auto_names_those_to_choose_from(llm, stocked):
    session = llm.session(memories=["auto", "boats"], store=stocked)
    asked = [session.ask(question, max_new_tokens=2).memories for question in (ABOUT_BEES, ABOUT_BOATS)]
    assert asked == [(), ("boats",)]


def test_what_the_model_cannot_use_is_left_out_unless_it_is_named(llm, stocked):
    chosen = llm.session(memories="auto", store=stocked).memories.memories
    assert [memory.name for memory in chosen] == ["bees", "boats"]
    with pytest.raises(ConfigurationError, match="'strange' was learned by 'other'"):
        llm.session(memories=["auto", "strange"], store=stocked)


def test_an_adapter_comes_onto_the_model_when_it_is_chosen_first(llm, stocked):
    session = llm.session(memories="auto", store=stocked)
    session.ask(UNRELATED, max_new_tokens=2)
    assert len(llm.handle.adapters) == 0
    session.ask(ABOUT_BEES, max_new_tokens=2)
    session.ask(ABOUT_BEES, max_new_tokens=2)
    assert len(llm.handle.adapters) == 1


@pytest.mark.usefixtures("surer")
def test_without_a_memory_to_choose_the_base_model_answers(llm, store):
    answer = llm.session(memories="auto", store=store).ask(ABOUT_BEES, max_new_tokens=6)
    assert answer.memories == () and answer.text == llm.session().ask(ABOUT_BEES, max_new_tokens=6).text


@pytest.mark.usefixtures("surer")
def test_a_restored_session_chooses_from_what_is_there_now(llm, stocked, tmp_path):
    session = llm.session(memories="auto", store=stocked)
    session.read(TEXT)
    session.chat(ABOUT_BEES, max_new_tokens=4)
    session.save(tmp_path / "a.state")
    restored = llm.restore(tmp_path / "a.state", store=stocked)
    session.read(TEXT)
    restored.read(TEXT)
    assert torch.equal(next_logits(restored), next_logits(session))
    again, before = (each.ask(ABOUT_BOATS, max_new_tokens=4) for each in (restored, session))
    assert again.memories == ("boats",) and again.text == before.text
    stocked.delete("boats")
    assert llm.restore(tmp_path / "a.state", store=stocked).ask(ABOUT_BOATS, max_new_tokens=4).memories == ()


def test_a_restored_session_chooses_from_the_same_names(llm, stocked, tmp_path):
    llm.session(memories=["auto", "boats"], store=stocked).save(tmp_path / "a.state")
    chosen = llm.restore(tmp_path / "a.state", store=stocked).memories.memories
    assert [memory.name for memory in chosen] == ["boats"]
    stocked.delete("boats")
    with pytest.raises(UnknownNameError, match="'boats'"):
        llm.restore(tmp_path / "a.state", store=stocked)


@pytest.mark.usefixtures("surer")
def test_forks_choose_for_themselves(llm, stocked):
    session = llm.session(memories="auto", store=stocked)
    session.read(TEXT)
    one, other = session.fork(), session.fork()
    assert one.chat(ABOUT_BEES, max_new_tokens=2).memories == ("bees",)
    assert other.chat(ABOUT_BOATS, max_new_tokens=2).memories == ("boats",)
    assert one.chat(ABOUT_BOATS, max_new_tokens=2).memories == ("boats",)


@pytest.mark.usefixtures("surer")
@pytest.mark.parametrize("policy", [FullAttention(), LMInfinite(window=24, sinks=2)], ids=["full", "window"])
def test_questions_answered_together_each_have_their_own_memory(llm, stocked, policy):
    session = llm.session(policy, memories="auto", store=stocked)
    session.read(TEXT)
    questions = [ABOUT_BEES, UNRELATED, ABOUT_BOATS, ABOUT_BEES]
    together = llm.ask_together([session] * 4, questions, max_new_tokens=8)
    alone = [session.ask(question, max_new_tokens=8) for question in questions]
    assert [answer.memories for answer in together] == [("bees",), (), ("boats",), ("bees",)]
    assert [answer.text for answer in together] == [answer.text for answer in alone]


def test_what_cannot_be_is_refused(llm, stocked):
    with pytest.raises(ConfigurationError, match="have no weights"):
        llm.session(memories="auto", memory_weights=[1.0], store=stocked)
    with pytest.raises(UnknownNameError, match="did you mean 'bees'"):
        llm.session(memories=["auto", "beez"], store=stocked)
    with pytest.raises(ConfigurationError, match="or 'auto'"):
        llm.session(memories="bees", store=stocked)
    with pytest.raises(ConfigurationError, match="'Auto' cannot name a memory"):
        record("Auto")


def test_a_memory_deleted_meanwhile_is_an_error_that_leaves_the_session(llm, stocked):
    session = llm.session(memories="auto", store=stocked)
    stocked.delete("bees")
    with pytest.raises(MemoryStoreError):
        session.ask(ABOUT_BEES, max_new_tokens=2)
    assert session.ask(UNRELATED, max_new_tokens=2).tokens


def test_words_that_every_question_has_do_not_count(llm, stocked):
    router = llm.session(memories="auto", store=stocked).memories
    assert router.most_like("Who does the what?") is None
    memory, likeness = router.most_like("Who is it that sells the honey?")
    assert memory.name == "bees" and likeness > 0.9
    assert router.most_like("Who sells unheard things?")[1] < 0.5


def test_a_text_scores_in_full_where_a_document_of_mean_length_has_its_words_once():
    index = LexicalIndex(["one two three", "four five six", "four two seven"])
    ((number, score),) = index.search("one two three", 1)
    assert number == 0 and score == pytest.approx(index.full_score("one two three"))
    assert index.full_score("one unheard") > index.full_score("one") > index.full_score("two") > 0
    assert index.full_score("") == 0
