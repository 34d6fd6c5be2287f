"""Methods that read for one question: what they read, what they answer, and what they refuse."""

from __future__ import annotations

import argparse
import io
import random
from pathlib import Path

import pytest
import torch

import everlong
from everlong.attention import FullAttention, LMInfinite
from everlong.errors import (
    ConfigurationError,
    InputError,
    UnknownNameError,
    UnsupportedModelError,
    UnsupportedUseError,
)
from everlong.llm import LLM, load
from everlong.reading import READING_METHODS, Homer, InfiniRetri, ParallelWindows, Sampling
from everlong.reading.outside import Errand, Task, make_reading_method
from everlong.reading.sentences import SentenceCutter
from tests.reading.conftest import TEXT, make_llm
from tests.reading.small_tokenizers import trained
from tests.reference.homer import Homer as HomerReference
from tests.reference.outside import carried_to_the_end, parallel_logits, picked_sentences
from tests.tiny import BYTE_VOCAB, build, byte_tokenizer

QUESTION = "Who rained on the 中文?"
STORY = "".join(
    f"It rained on day {number}. Nobody went out, but {number * 7} cats did! " for number in range(9)
)
FAMILIES = ("llama", "qwen3", "gpt_neox", "smollm3")
METHODS = {
    "infini-retri": InfiniRetri(chunk=150, top=20, carried=120, longest=60),
    "parallel-windows": ParallelWindows(window=150),
    "homer": Homer(window=560, warmup=0, calibration=4),
}
DEEP = {"num_hidden_layers": 6}  # so that chunks can merge several times


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


@pytest.fixture
def llm():
    with make_llm(LMInfinite(window=200), max_position_embeddings=1024, **DEEP) as made:
        yield made


def in_bytes(family, **config):
    special = {"vocab_size": BYTE_VOCAB, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    model = build(family, **(special | {"max_position_embeddings": 1024} | config))
    model.set_attn_implementation("eager")
    return model, byte_tokenizer()


def around(tokenizer):
    """Ids before a text, of the question, and behind it, as the chat template has them."""
    content = f"{{text}}\n\n{QUESTION}"
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    before, after = whole.split(content)
    return tuple(tokenizer(part)["input_ids"] for part in (before, f"\n\n{QUESTION}", after))


def sentences_of(tokenizer, text, longest=128):
    cutter = SentenceCutter(tokenizer, longest)
    return [*cutter.feed(tokenizer(text)["input_ids"]), *cutter.finish()]


def written(logits_behind, count):
    """Write greedily: `logits_behind` tells the logits (vocabulary,) behind what was written."""
    ids = []
    for _ in range(count):
        ids.append(int(logits_behind(ids).argmax()))
    return ids


# --- against the definitions ------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_infini_retri_answers_from_what_the_definition_carries(family):
    model, tokenizer = in_bytes(family)
    sentences, parts = sentences_of(tokenizer, STORY, 60), around(tokenizer)
    given = {"chunk": 150, "top": 20, "smoothing": 8}
    carried = carried_to_the_end(model, sentences, parts, 1, **given, most=200)
    read = [token for sentence in carried for token in sentence]
    opening, question, after = parts

    @torch.no_grad()
    def behind(ids):
        return model(torch.tensor([[*opening, *read, *question, *after, *ids]])).logits[0, -1]

    expected = written(behind, 8)
    with LLM(model, tokenizer, "tiny", FullAttention()) as llm:
        answer = llm.ask(STORY, QUESTION, InfiniRetri(**given, carried=200, longest=60), max_new_tokens=8)
    assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert answer.stats.kept + answer.stats.waiting == sum(map(len, parts)) + len(read) + 8
    assert 150 < len(read) < 350 < len(STORY.encode()), "some was carried, and not all"


@pytest.mark.parametrize("family", FAMILIES)
def test_parallel_windows_answer_what_one_stock_forward_does(family):
    model, tokenizer = in_bytes(family)
    opening, question, after = around(tokenizer)
    windows, room = [[]], 150
    for sentence in sentences_of(tokenizer, STORY):
        if len(windows[-1]) + len(sentence) > room:
            windows.append([])
        windows[-1] += sentence
    expected = written(lambda ids: parallel_logits(model, opening, windows, [*question, *after, *ids])[-1], 3)
    with LLM(model, tokenizer, "tiny", FullAttention()) as llm:
        answer = llm.ask(STORY, QUESTION, ParallelWindows(window=room), max_new_tokens=3)
    assert len(windows) == 4
    assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)


def homer_by_definition(model, opening, text, question, method, borders):
    """What HOMER reads of a text of which four chunks are made, and two merges."""
    sinks = max(0, 4 - len(opening))
    prefix, rest = [*opening, *text[:sinks]], text[sinks:]
    room = method.window // 2 - len(prefix) - len(question)
    assert 2 * room < len(rest) <= 4 * room
    chunks = [rest[len(rest) * at // 4 : len(rest) * (at + 1) // 4] for at in range(4)]
    given = model, prefix, chunks, question, room, borders, range(method.calibration), 32
    return HomerReference(*given, neighbours=method.neighbours)


@pytest.mark.parametrize(
    ("method", "borders"),
    [(METHODS["homer"], (2, 4)), (Homer(window=560, warmup=1, calibration=0, neighbours=2), (4, 5))],
    ids=["calibrated", "with neighbours"],
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_homer_answers_what_the_definition_does(family, method, borders):
    local = {"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 8}
    model, tokenizer = in_bytes(family, **DEEP, **(local if family == "gemma3_text" else {}))
    model.double()
    if family == "gemma3_text":  # chunks merge behind layers with full attention
        borders = (2, 4)
    opening, question, after = around(tokenizer)
    text = tokenizer(STORY)["input_ids"]
    definition = homer_by_definition(model, opening, text, [*question, *after], method, borders)
    expected = written(lambda ids: definition.logits(ids)[-1], 3)
    with LLM(model, tokenizer, "tiny", FullAttention()) as llm:
        answer = llm.ask(STORY, QUESTION, method, max_new_tokens=3)
    assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert answer.stats.kept + answer.stats.waiting == 280 + 3 and answer.stats.forgotten > 200


def test_homer_begins_every_chunk_with_first_tokens_of_the_text_where_there_are_no_others():
    model, tokenizer = in_bytes("llama", **DEEP)
    tokenizer.chat_template = None
    model.double()
    text, question = (tokenizer(part)["input_ids"] for part in (STORY, f"\n\nQuestion: {QUESTION}\nAnswer:"))
    definition = homer_by_definition(model, [], text, question, METHODS["homer"], (2, 4))
    expected = written(lambda ids: definition.logits(ids)[-1], 3)
    with LLM(model, tokenizer, "tiny", FullAttention()) as llm:
        answer = llm.ask(STORY, QUESTION, METHODS["homer"], max_new_tokens=3)
    assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("smoothing", [1, 2, 3, 8])
def test_what_is_picked_is_what_the_definition_picks(smoothing):
    draws = random.Random(smoothing)
    for _ in range(40):
        lengths = [draws.randint(1, 9) for _ in range(draws.randint(1, 20))]
        attention = [float(draws.randint(0, 5)) for _ in range(sum(lengths))]  # many are equal
        top, most = draws.randint(1, 30), draws.randint(9, 60)
        ours = InfiniRetri(top=top, smoothing=smoothing).picked(torch.tensor(attention), lengths, most)
        assert ours == picked_sentences(attention, lengths, top, smoothing, most)
        assert sum(lengths[number] for number in ours) <= most


# --- what holds for each of them --------------------------------------------------------------------


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_a_text_that_fits_is_answered_as_by_full_attention(chat, add_bos):
    methods = InfiniRetri(chunk=600), ParallelWindows(window=600), Homer(window=1024)
    with make_llm(FullAttention(), chat=chat, add_bos=add_bos, max_position_embeddings=1024) as llm:
        session = llm.session(system="Be brief.")
        session.read(TEXT)
        expected = session.ask(QUESTION, max_new_tokens=12)
        for method in methods:
            answer = llm.ask(TEXT, QUESTION, method, system="Be brief.", max_new_tokens=12)
            assert answer.text == expected.text
            assert answer.stop_reason == expected.stop_reason
            for name in ("tokens_read", "tokens_written", "kept", "forgotten", "waiting"):
                assert getattr(answer.stats, name) == getattr(expected.stats, name), name


def test_tokenizers_that_put_a_blank_before_a_text_put_none_before_the_question():
    tokenizer = trained("llama2")
    model = build("llama", vocab_size=len(tokenizer), max_position_embeddings=1024)
    with LLM(model, tokenizer, "tiny", FullAttention()) as llm:
        coder = llm._attached.coder
        text, asked = coder.encode("It is a truth."), coder.encode_after(f"\n\nQuestion: {QUESTION}\nAnswer:")
        assert asked != coder.encode(f"\n\nQuestion: {QUESTION}\nAnswer:")
        errand = Errand(Task(llm._attached, ["It is a truth."], QUESTION), 128)
        assert list(errand.sentences()) == [text]
        assert errand.laid_out(text).queue == [*errand.opening, *text, *asked]
        assert errand.asked(errand.new_cache()).queue == asked


def test_the_accounts_add_up(llm, method):
    stats = llm.ask(STORY * 4, QUESTION, method, max_new_tokens=9).stats
    assert stats.tokens_read > len(STORY.encode()) * 4
    assert stats.tokens_read + stats.tokens_written == stats.kept + stats.forgotten + stats.waiting
    assert stats.seconds > 0 and stats.tokens_per_second > 0 and stats.bytes["window"] > 0
    assert (stats.forgotten == 0) == isinstance(method, ParallelWindows)


def test_a_text_is_the_same_in_pieces_as_ids_and_in_files(llm, method, tmp_path):
    expected = llm.ask(STORY, QUESTION, method, max_new_tokens=9).text
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text(STORY[:200])
    second.write_text(STORY[200:])
    for source in (
        (STORY[at : at + 7] for at in range(0, len(STORY), 7)),
        list(STORY.encode()),
        io.StringIO(STORY),
        [first, second],
        (first, io.BytesIO(STORY[200:].encode())),
    ):
        assert llm.ask(source, QUESTION, method, max_new_tokens=9).text == expected


def test_what_is_read_depends_on_the_question(llm):
    kept = {
        llm.ask(STORY, question, METHODS["infini-retri"], max_new_tokens=1).stats.kept - len(question)
        for question in ("Who?", "When did 21 cats go out?", "What did nobody do on day 5?")
    }
    assert len(kept) > 1


def test_infini_retri_holds_no_more_of_a_longer_text(llm):
    method = METHODS["infini-retri"]
    held = {
        count: llm.ask((STORY for _ in range(count)), QUESTION, method, max_new_tokens=1).stats
        for count in (1, 12)
    }
    assert held[12].tokens_read > 5000
    most = 150 + 120 + 60  # a chunk, what is carried, and what stands around
    assert all(stats.kept < most for stats in held.values())
    assert held[12].bytes["window"] < 1.5 * held[1].bytes["window"]  # room to spare


def test_homer_keeps_half_the_window_of_a_text_of_any_length(llm):
    held = {
        count: llm.ask((STORY for _ in range(count)), QUESTION, METHODS["homer"], max_new_tokens=1).stats
        for count in (1, 9)
    }
    assert held[9].tokens_read > 4000
    assert [stats.kept + stats.waiting for stats in held.values()] == [281, 281]
    assert held[9].bytes == held[1].bytes


def test_the_answer_comes_in_pieces_and_reading_tells_how_far_it_is(llm, method):
    seen = []
    pieces = llm.stream_answer(STORY, QUESTION, method, max_new_tokens=12, progress=seen.append)
    text = "".join(pieces)
    assert text == llm.ask(STORY, QUESTION, method, max_new_tokens=12).text
    assert len(seen) > 2 and [at.tokens for at in seen] == sorted(at.tokens for at in seen)
    assert seen[-1].total >= seen[-1].tokens > 300 and seen[-1].bytes["window"] > 0


def test_how_it_writes_can_be_said(llm, method):
    plain = llm.ask(STORY, QUESTION, method, max_new_tokens=12)
    guessed = llm.ask(STORY, QUESTION, method, max_new_tokens=12, speculate="prompt-lookup")
    assert guessed.text == plain.text
    ahead = llm.ask(STORY, QUESTION, method, max_new_tokens=12, speculate="lookahead")
    assert ahead.text == plain.text
    stop = plain.text[3:5]
    stopped = llm.ask(STORY, QUESTION, method, max_new_tokens=12, stop=stop)
    assert stopped.text == plain.text[: plain.text.index(stop)] and stopped.stop_reason == "stop"
    drawn = [
        llm.ask(
            STORY, QUESTION, method, max_new_tokens=12, sampling=Sampling(temperature=1.0, seed=seed)
        ).text
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_sessions_of_the_model_are_not_disturbed(llm, method):
    session = llm.session()
    session.read(TEXT)
    expected = session.ask(QUESTION, max_new_tokens=9).text
    llm.ask(STORY, QUESTION, method, max_new_tokens=9)
    assert session.ask(QUESTION, max_new_tokens=9).text == expected


def test_by_name_with_options():
    assert make_reading_method("infini-retri", {"chunk": "512", "top": 30}) == InfiniRetri(chunk=512, top=30)
    assert make_reading_method("parallel-windows") == ParallelWindows()
    assert make_reading_method("homer", {"window": "512", "neighbours": 3}) == Homer(window=512, neighbours=3)
    assert {READING_METHODS[name] for name in READING_METHODS} == {InfiniRetri, ParallelWindows, Homer}
    assert all(getattr(everlong, READING_METHODS[name].__name__) for name in READING_METHODS)


# --- a real model -----------------------------------------------------------------------------------


@pytest.mark.model
def test_a_fact_in_a_long_text_is_found():
    with load("smollm2-135m", device="cpu") as llm:
        ids = llm.tokenizer(Path(argparse.__file__).read_text())["input_ids"][:6000]
        before, after = llm.tokenizer.decode(ids[:2400]), llm.tokenizer.decode(ids[2400:])
        text = f"{before}\nThe secret code of the old harbour is 48213.\n{after}"
        question = "What is the secret code of the old harbour?"
        answer = llm.ask(text, question, InfiniRetri(chunk=1024), max_new_tokens=20)
        assert "48213" in answer.text
        assert answer.stats.tokens_read > 6000 and answer.stats.forgotten > 4000


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_without_a_question_they_are_refused_with_the_remedy(llm, name):
    for use in (
        lambda: llm.session(name),
        lambda: load(llm.model, name, tokenizer=llm.tokenizer),
        lambda: everlong.make_policy(name),
    ):
        with pytest.raises(UnknownNameError, match=f"reads for one question.*--method {name}.*llm.ask"):
            use()
    with pytest.raises(ConfigurationError, match=r"a reading method is for llm\.ask"):
        llm.session(METHODS[name])
    with pytest.raises(InputError, match="the question is empty"):
        llm.ask(STORY, "", name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InfiniRetri(chunk=0), "chunk must be a whole number of at least 1"),
        (lambda: InfiniRetri(top=0), "top must be a whole number"),
        (lambda: InfiniRetri(smoothing=1.5), "smoothing must be a whole number"),
        (lambda: InfiniRetri(carried=-1), "carried must be a whole number"),
        (lambda: InfiniRetri(chunk=100), "cannot hold a sentence of 128.*longest=100"),
        (lambda: InfiniRetri(carried=100), "carried=100 tokens cannot hold a sentence of 128"),
        (lambda: ParallelWindows(window=0), "window must be a whole number"),
        (lambda: Homer(window=1), "window must be a whole number of at least 2"),
        (lambda: Homer(warmup=-1), "warmup must be a whole number"),
        (lambda: Homer(sinks=0.5), "sinks must be a whole number"),
        (lambda: Homer(calibration=-1), "calibration must be a whole number"),
        (lambda: Homer(neighbours=-1), "neighbours must be a whole number"),
        (lambda: make_reading_method("infini-retri", {"chunks": 5}), "did you mean 'chunk'"),
        (lambda: make_reading_method("infini-retry"), "did you mean 'infini-retri'"),
        (lambda: make_reading_method("lm-infinite"), "is an attention policy.*llm.session"),
    ],
)
def test_options_that_cannot_work_are_refused_where_they_are_given(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (InfiniRetri(), "trained on 1024 tokens.*fewer than a chunk of 1024 and 128 that are carried"),
        (InfiniRetri(chunk=500, carried=400), "fewer than a chunk of 500 and 400 that are carried"),
        (ParallelWindows(window=800), "trained on 1024 tokens.*fewer than a window of 800"),
        (Homer(window=2000), r"trained on 1024 tokens.*fewer than the \d+ that a chunk has room for"),
        (Homer(window=100), "half the window of 100 tokens.*no room is left for the text"),
    ],
)
def test_what_the_model_was_not_trained_for_is_refused_before_reading(llm, method, message):
    def unread():
        raise AssertionError("it was read")
        yield ""

    with pytest.raises(ConfigurationError, match=message):
        llm.ask(unread(), QUESTION, method)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (InfiniRetri(), r"InfiniRetri\(carried="),
        (ParallelWindows(), r"ParallelWindows\(window="),
        (Homer(), r"Homer\(window="),
    ],
)
def test_where_the_training_length_is_not_known_it_is_asked_for(llm, method, message, monkeypatch):
    monkeypatch.setattr(llm.handle, "training_length", None)
    with pytest.raises(ConfigurationError, match=message):
        llm.ask(STORY, QUESTION, method)
    told = type(method)(**({"carried": 200} if isinstance(method, InfiniRetri) else {"window": 500}))
    assert llm.ask(STORY, QUESTION, told, max_new_tokens=3).tokens == 3


def test_models_that_cannot_be_driven_so_are_refused():
    local = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 8}
    model, tokenizer = in_bytes("ministral", **local)
    with (
        LLM(model, tokenizer, "tiny", FullAttention()) as llm,
        pytest.raises(UnsupportedModelError, match="no layer of this model has full attention"),
    ):
        llm.ask(STORY, QUESTION, InfiniRetri(chunk=150))
    model, tokenizer = in_bytes("gemma2")
    with LLM(model, tokenizer, "tiny", FullAttention()) as llm:
        assert llm.ask(STORY, QUESTION, METHODS["infini-retri"], max_new_tokens=2).tokens == 2
        with pytest.raises(UnsupportedModelError, match="local window"):
            llm.ask(STORY, QUESTION, ParallelWindows())
    scaled = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}
    model, tokenizer = in_bytes("llama", **scaled)
    with (
        LLM(model, tokenizer, "tiny", FullAttention()) as llm,
        pytest.raises(UnsupportedUseError, match="rotation depends on the length"),
    ):
        llm.ask(STORY, QUESTION, ParallelWindows())
    with (
        LLM(model, tokenizer, "tiny", FullAttention()) as llm,
        pytest.raises(UnsupportedUseError, match="rotation depends on the length"),
    ):
        llm.ask(STORY, QUESTION, Homer())


def test_homer_needs_a_layer_for_every_time_that_chunks_merge():
    with (
        make_llm(FullAttention(), max_position_embeddings=1024) as llm,
        pytest.raises(
            UnsupportedModelError, match="are 4 chunks, which merge behind 2 layers.* 2 layers are 1:"
        ),
    ):
        llm.ask(STORY, QUESTION, METHODS["homer"])


def test_bad_sources_and_bad_calls_are_refused(llm, method, tmp_path):
    for source in ("", [], [tmp_path / "missing.txt"], io.BytesIO(b"\x89PNG\0\0"), [BYTE_VOCAB]):
        with pytest.raises(InputError):
            llm.ask(source, QUESTION, method, max_new_tokens=3)
    with pytest.raises(InputError, match="the system text is empty"):
        llm.ask(STORY, QUESTION, method, system="")
    with pytest.raises(ConfigurationError, match="max_new_tokens=0"):
        llm.ask(STORY, QUESTION, method, max_new_tokens=0)
    with pytest.raises(ConfigurationError, match="neither a reading method.*for sessions"):
        llm.ask(STORY, QUESTION, FullAttention())
    with pytest.raises(UnknownNameError, match="did you mean 'lookahead'"):
        llm.ask(STORY, QUESTION, method, speculate="lookahed")
