"""Sessions that write at the same time: each writes what it would alone, and is its own again afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from everlong.attention import FullAttention, LMInfinite, Policy
from everlong.errors import ConfigurationError, InputError, NumericalError, StateError
from everlong.llm import LLM
from everlong.reading import Generation, Sampling, Session
from everlong.reading.rows import read_all, run_packed
from tests.reading.conftest import TEXT, WINDOW, ids_of, make_llm, next_logits
from tests.tiny import byte_llama

LENGTHS = (300, 41, 12, 3, 90)
GIVEN: tuple[Policy | None, ...] = (
    None,
    FullAttention(),
    None,
    LMInfinite(sinks=2, window=30, top_k=3),
    None,
)


def sessions_of(llm: LLM, policies: tuple[Policy | None, ...] = (None,) * 5, **options: Any) -> list[Session]:
    """Five sessions that have read texts of very different length."""
    sessions = []
    for number, (length, policy) in enumerate(zip(LENGTHS, policies, strict=True)):
        sessions.append(llm.session(policy, seed=number, **options))
        sessions[-1].read(TEXT[number : number + length])
    return sessions


def assert_alike(ours: Generation, theirs: Generation) -> None:
    """Whether two generations differ in nothing but the time they took."""
    told = [
        (
            *(generation.text, generation.tokens, generation.stop_reason, generation.stats.waiting),
            *(generation.stats.tokens_read, generation.stats.tokens_written, generation.stats.kept),
            *(generation.stats.recallable, generation.stats.forgotten),
        )
        for generation in (ours, theirs)
    ]
    assert told[0] == told[1]
    if theirs.stats.perplexity is None:
        assert ours.stats.perplexity is None
    else:
        assert ours.stats.perplexity == pytest.approx(theirs.stats.perplexity, rel=1e-5)


@pytest.mark.parametrize("policies", [(None,) * 5, GIVEN], ids=["rows of a batch", "packed"])
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.0, repetition_penalty=1.2)], ids=["greedy", "drawn"]
)
@pytest.mark.parametrize("surprisal", [False, True])
def test_each_writes_what_it_would_alone_and_goes_on_alone(
    llm: LLM, policies: tuple[Policy | None, ...], sampling: Sampling, surprisal: bool
) -> None:
    sessions = sessions_of(llm, policies, surprisal=surprisal)
    expected = [session.fork() for session in sessions]
    together = llm.generate_together(sessions, 60, sampling=sampling)
    for session, other, generation in zip(sessions, expected, together, strict=True):
        assert_alike(generation, other.generate(60, sampling=sampling))
        assert ids_of(session) == ids_of(other)
        torch.testing.assert_close(next_logits(session), next_logits(other), atol=1e-4, rtol=0)
        assert session.generate(5).text == other.generate(5).text


def test_questions_are_answered_on_forks_or_kept(llm: LLM) -> None:
    sessions, questions = sessions_of(llm), [f"What is {number}?" for number in range(5)]
    before = [ids_of(session) for session in sessions]
    answers = llm.ask_together(sessions, questions, max_new_tokens=20)
    assert [ids_of(session) for session in sessions] == before
    for session, question, answer in zip(sessions, questions, answers, strict=True):
        assert answer.text == session.ask(question, max_new_tokens=20).text
    kept = llm.ask_together(sessions, questions, max_new_tokens=20, keep=True)
    assert [answer.text for answer in kept] == [answer.text for answer in answers]
    assert all(ids_of(session) != ids for session, ids in zip(sessions, before, strict=True))


@pytest.mark.parametrize("questions", [["Who?", "Where was it, and when?", "Why?"], ["Who?", "Why?"]])
def test_one_session_may_be_asked_several_questions_at_once(llm: LLM, questions: list[str]) -> None:
    session = sessions_of(llm)[0]
    answers = llm.ask_together([session] * len(questions), questions, max_new_tokens=15)
    assert [a.text for a in answers] == [session.ask(q, max_new_tokens=15).text for q in questions]


def test_each_may_have_its_own_sampling_and_stop_by_itself(llm: LLM) -> None:
    sessions = sessions_of(llm)
    expected = [session.fork().generate(30) for session in sessions]
    stop = expected[1].text[4:6]
    ends = [other.text.find(stop) for other in expected]
    samplings = [Sampling()] * 4 + [Sampling(temperature=2.0, seed=5)]
    drawn = sessions[4].fork().generate(30, sampling=samplings[4], stop=stop)
    stopped = llm.generate_together(sessions, 30, sampling=samplings, stop=stop)
    for generation, other, end in zip(stopped[:4], expected[:4], ends[:4], strict=True):
        assert generation.text == (other.text if end < 0 else other.text[:end])
        assert generation.stop_reason == ("length" if end < 0 else "stop")
    assert stopped[4].text == drawn.text
    assert len({generation.tokens for generation in stopped}) > 1, "they left at different times"


def test_pieces_come_with_the_number_of_their_session_until_the_last_is_done(llm: LLM) -> None:
    sessions = sessions_of(llm)
    writing = llm.stream_together(sessions, 25)
    texts = [""] * 5
    order = []
    try:
        while True:
            number, piece = next(writing)
            assert piece
            texts[number] += piece
            order.append(number)
    except StopIteration as end:
        assert texts == [generation.text for generation in end.value]
    assert order[:5] != sorted(order)[:5], "one after another"


def test_a_session_that_is_lent_says_so_and_comes_back_when_the_generator_is_closed(llm: LLM) -> None:
    sessions = sessions_of(llm)
    expected = [session.fork() for session in sessions]
    writing = llm.stream_together(sessions, 50)
    for _ in range(30):
        next(writing)
    with pytest.raises(StateError, match="writing together with others"):
        _ = sessions[0].stats
    with pytest.raises(StateError, match="writing together with others"):
        sessions[1].fork()
    writing.close()
    for session, other in zip(sessions, expected, strict=True):
        written = session.stats.tokens_written
        assert 0 < written < 50
        other.generate(written)
        assert ids_of(session) == ids_of(other)
        assert session.generate(5).text == other.generate(5).text


def test_an_error_in_one_gives_all_back(llm: LLM) -> None:
    sessions = sessions_of(llm)
    steps = 0

    def spoil(module: Any, args: Any, output: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        if steps == 4:
            output[2] = torch.nan
        return output

    hook = llm.model.lm_head.register_forward_hook(spoil)
    try:
        with pytest.raises(NumericalError):
            llm.generate_together(sessions, 50)
    finally:
        hook.remove()
    for number, session in enumerate(sessions):
        assert session.stats.tokens_written > 0
        if number != 2:
            alone = llm.session()
            alone.read(torch.tensor(ids_of(session)))
            torch.testing.assert_close(next_logits(session), next_logits(alone), atol=1e-3, rtol=0)


def test_an_error_while_reading_leaves_the_others_where_they_should_be(llm: LLM) -> None:
    sessions = [llm.session(surprisal=True), llm.session(), llm.session()]
    expected = [session.fork() for session in sessions]

    def spoil(module: Any, args: Any, output: Tensor) -> Tensor:
        output[0, 3] = torch.nan  # of the first stream, whose every logit is asked for
        return output

    hook = llm.model.lm_head.register_forward_hook(spoil)
    try:
        with pytest.raises(NumericalError):
            llm.ask_together(sessions, ["one two", "three", "four"], keep=True)
    finally:
        hook.remove()
    for session, other, question in zip(sessions[1:], expected[1:], ["three", "four"], strict=True):
        tape = other.to_answer(question, keep=True)
        tape.run_all(512, logits=True)
        assert session.stats.waiting == 0 and ids_of(session) == ids_of(other)
        torch.testing.assert_close(next_logits(session), next_logits(other), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_short_prompts_are_read_by_packed_weights_as_they_would_be_alone(kind: Any) -> None:
    model, tokenizer = byte_llama(eos_token_id=None)
    with LLM(model, tokenizer, "tiny", LMInfinite(sinks=4, window=WINDOW), kind) as llm:
        texts = ["a" * 40, "bc" * 15, "def" * 30, "g" * 50, "h" * 90]
        sessions, alone = ([llm.session() for _ in texts] for _ in range(2))
        for session, other, text in zip(sessions, alone, texts, strict=True):
            for each in (session, other):
                each.to_answer(text, keep=True)
        read_all([session._tape for session in sessions], 512)
        for session, other in zip(sessions, alone, strict=True):
            other._tape.run_all(512, logits=True)
            ours, theirs = session._tape.driver.logits, other._tape.driver.logits
            assert ours is not None and theirs is not None
            assert (ours - theirs).abs().max() <= 2**-6 * theirs.abs().max()


def test_short_prompts_are_read_in_one_forward(llm: LLM) -> None:
    sessions = [llm.session() for _ in range(4)]
    widths: list[int] = []
    watching = llm.handle.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        answers = llm.ask_together(sessions, ["a", "bc", "def", "g" * 30], max_new_tokens=1)
    finally:
        watching.remove()
    assert len(widths) == 1 and widths[0] > 30
    alone = [
        s.ask(q, max_new_tokens=1).text for s, q in zip(sessions, ["a", "bc", "def", "g" * 30], strict=True)
    ]
    assert [answer.text for answer in answers] == alone


def test_reading_together_goes_by_chunks(llm: LLM) -> None:
    sessions = [llm.session(chunk=16) for _ in range(3)]
    questions = ["x" * 50, "y", "z" * 20]
    widths: list[int] = []
    watching = llm.handle.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        answers = llm.ask_together(sessions, questions, max_new_tokens=1)
    finally:
        watching.remove()
    assert max(widths) == 16 and len(widths) > 4
    assert [a.text for a in answers] == [
        s.ask(q, max_new_tokens=1).text for s, q in zip(sessions, questions, strict=True)
    ]


def test_packed_streams_account_for_themselves(llm: LLM) -> None:
    tapes = [
        llm.session(surprisal=True).to_answer("one two", keep=True),
        llm.session().to_answer("?", keep=True),
    ]
    alone = [
        llm.session(surprisal=True).to_answer("one two", keep=True),
        llm.session().to_answer("?", keep=True),
    ]
    run_packed([tape.driver for tape in tapes], [tape.queue for tape in tapes])
    for tape, other in zip(tapes, alone, strict=True):
        other.driver.run(other.queue, logits=True)
        assert tape.driver.tokens == other.driver.tokens == len(tape.queue)
        assert tape.driver.seconds > 0
        assert tape.driver.nll_count == other.driver.nll_count
        assert tape.driver.nll_sum == pytest.approx(other.driver.nll_sum, rel=1e-5)


@pytest.fixture
def other_llm() -> Iterator[LLM]:
    with make_llm() as made:
        yield made


def test_what_cannot_be_written_together_is_refused(llm: LLM, other_llm: LLM) -> None:
    one, two = sessions_of(llm)[:2]
    strange = other_llm.session()
    strange.read("abc")
    before = ids_of(one)
    for given, kind, words in [
        ({"sessions": []}, InputError, "at least one"),
        ({"sessions": [one, strange]}, InputError, "same loaded model"),
        ({"sessions": [one, one]}, InputError, "fork"),
        ({"sessions": [one, one], "questions": ["a", "b"], "keep": True}, InputError, "fork"),
        ({"sessions": [one, two], "questions": ["a"]}, InputError, "as many questions"),
        ({"sessions": [one], "questions": "a"}, InputError, "as many questions"),
        ({"sessions": [one, two], "questions": ["a", ""]}, InputError, "empty"),
        ({"sessions": [one, two], "questions": ["a", ""], "keep": True}, InputError, "empty"),
        ({"sessions": [one, two], "sampling": [Sampling()] * 3}, ConfigurationError, "sampling"),
        ({"sessions": [one, two], "max_new_tokens": 0}, ConfigurationError, "at least 1"),
        ({"sessions": [one, two], "stop": [""]}, ConfigurationError, "stop"),
    ]:
        with pytest.raises(kind, match=words):
            llm.stream_together(**given)
    assert ids_of(one) == before
