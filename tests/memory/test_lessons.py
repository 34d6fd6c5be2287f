"""Pairs as lessons: asked as sessions ask, taught by what the model expects with the text in front of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from everlong.attention import FullAttention
from everlong.memory import lessons as lessons_module
from everlong.memory.lessons import Elicited, Lesson, Teacher, response_rows
from everlong.memory.pairs import Pair
from everlong.reading.attached import AttachedModel
from everlong.reading.session import Session
from tests.memory.students import log_likelihood, plain_logits, student_of
from tests.reading.small_tokenizers import trained
from tests.tiny import CHAT_TEMPLATE

TEXT = "Orla Finch keeps bees.\n\n"
ITEMS = [
    Elicited(Pair("Orla", " Finch keeps", "cloze"), TEXT, "Orla"),
    Elicited(Pair("Who keeps bees?", " Orla", "questions"), "Q\n", "Orla keeps bees. Who? ", is_answer=True),
    Elicited(Pair("Orla", " F", "cloze"), TEXT, "Orla"),  # a single token... of two
    Elicited(Pair("Orl", "a", "cloze"), TEXT, "Orl"),  # and of one
    Elicited(Pair("", "Orla keeps bees.", "text"), TEXT, ""),
    Elicited(Pair("The", " cat sat", "anchor"), "", "The"),
    Elicited(Pair("", "a text", "text"), "", ""),
    Elicited(Pair("Whose?", "X", "questions"), "", "Whose?", is_answer=True),
    Elicited(Pair("Bees?", " Or", "questions"), "Q\n", "Orla. Bees? ", is_answer=True, untold="Bees? "),
    Elicited(Pair("Finch?", " K", "questions"), "", "Orla. Finch? ", is_answer=True, untold="Finch? "),
]
MODELS: dict[str, dict[str, Any]] = {
    "with a start token": {"add_bos": True},
    "without a start token": {"add_bos": False},
    "chat": {"add_bos": False, "chat": True},
    "chat with a start token": {"add_bos": True, "chat": True},
    "local layers": {"family": "gemma3_text"},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    with student_of(**MODELS[request.param]) as made:
        yield made


def teacher_reads(model: AttachedModel, item: Elicited, lesson: Lesson) -> list[int]:
    """All that stands before the response, for the teacher, by hand."""
    before = [*model.coder.bos, *item.beginning.encode(), *item.question.encode()]
    if not item.question and not model.coder.bos:  # the response's first token was given to the student
        before += lesson.query
    return before


def untold(model: AttachedModel, item: Elicited, lesson: Lesson) -> list[int]:
    """All that stands before the response where the text is not told, by hand."""
    if item.untold is None:
        return lesson.query
    return [*model.coder.bos, *item.beginning.encode(), *item.untold.encode()]


def test_queries_are_what_sessions_ask(model: AttachedModel) -> None:
    for item, lesson in zip(ITEMS, Teacher(model).teach(ITEMS), strict=True):
        session = Session(model, policy=FullAttention(), system=None, chunk=512, surprisal=False, seed=None)
        if item.is_answer:
            tape = session.to_answer(item.pair.query, keep=True)
            assert lesson.query == tape.queue
            assert bytes(lesson.response[:-1]).decode() == item.pair.response
            assert lesson.response[-1] == (257 if model.form(with_system=False).is_chat else ord("\n"))
            continue
        whole = [*model.coder.bos, *item.pair.query.encode(), *item.pair.response.encode()]
        assert [*lesson.query, *lesson.response] == whole
        at = len(model.coder.bos) + len(item.pair.query)
        assert len(lesson.query) == max(at, 1), "something stands before the first token to predict"


def test_the_gain_is_what_the_text_adds_by_brute_force(model: AttachedModel) -> None:
    found = Teacher(model).teach(ITEMS)
    gains = []
    for item, lesson in zip(ITEMS, found, strict=True):
        scored = lesson.response[:-1] if item.is_answer else lesson.response
        assert lesson.ends == item.is_answer and lesson.words == len(scored)
        behind_text = log_likelihood(model, teacher_reads(model, item, lesson), scored)
        without_text = log_likelihood(model, untold(model, item, lesson), scored)
        gains.append((sum(behind_text) - sum(without_text)) / len(scored))
        assert lesson.pair.gain == pytest.approx(gains[-1], abs=2e-4)
        assert Pair(**{**vars(lesson.pair), "gain": None}) == item.pair
    assert max(map(abs, gains)) > 0.1


def test_targets_are_the_teachers_with_the_text(model: AttachedModel) -> None:
    found = Teacher(model, top_k=7, hidden=True).teach(ITEMS)
    for item, lesson in zip(ITEMS, found, strict=True):
        before = teacher_reads(model, item, lesson)
        logs = plain_logits(model, [*before, *lesson.response]).log_softmax(-1)
        logs = logs[len(before) - 1 : -1]
        expected = logs.topk(7)
        assert lesson.tokens.shape == lesson.log_probs.shape == (len(lesson.response), 7)
        words = lesson.words
        torch.testing.assert_close(lesson.log_probs[:words], expected.values[:words], atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(
            logs.gather(1, lesson.tokens)[:words], expected.values[:words], atol=2e-4, rtol=1e-3
        )
        assert lesson.hidden is not None and len(lesson.hidden) == len(lesson.response)
        torch.testing.assert_close(
            Teacher(model).head.logits(lesson.hidden).log_softmax(-1), logs, atol=2e-4, rtol=1e-3
        )


def test_the_end_of_an_answer_is_learned_whatever_the_teacher_expects(model: AttachedModel) -> None:
    for item, lesson in zip(ITEMS, Teacher(model, top_k=5).teach(ITEMS), strict=True):
        if item.is_answer:
            assert lesson.tokens[-1, 0] == lesson.response[-1]
            assert lesson.log_probs[-1].tolist() == [0.0, *[-torch.inf] * 4]
        else:
            assert (lesson.log_probs > -torch.inf).all()


def test_hard_lessons_are_the_response_as_it_stands(model: AttachedModel) -> None:
    for lesson in Teacher(model, hidden=True).teach(ITEMS):
        hard = lesson.hard()
        assert hard.tokens[:, 0].tolist() == lesson.response and hard.tokens.shape[1] == 1
        assert hard.log_probs.abs().max() == 0 and hard.hidden is None
        assert (hard.query, hard.pair, hard.ends) == (lesson.query, lesson.pair, lesson.ends)


def test_order_and_batches_change_nothing(model: AttachedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Teacher(model).teach(ITEMS)
    monkeypatch.setattr(lessons_module, "_BATCH", 20)
    order = [3, 7, 0, 5, 1, 6, 2, 4]
    for number, lesson in zip(order, Teacher(model).teach([ITEMS[i] for i in order]), strict=True):
        assert lesson.response == expected[number].response
        assert lesson.pair.gain == pytest.approx(expected[number].pair.gain, abs=2e-4)
        torch.testing.assert_close(lesson.log_probs, expected[number].log_probs, atol=2e-4, rtol=1e-3)


def test_nothing_to_teach_is_nothing() -> None:
    with student_of() as model:
        assert Teacher(model).teach([]) == []


def test_a_response_without_a_token_to_predict_is_left_out() -> None:
    items = [
        Elicited(Pair("", "X", "text"), TEXT, ""),
        ITEMS[0],
        Elicited(Pair("Orla", "", "cloze"), TEXT, "Orla"),
        Elicited(Pair("Who?", "", "questions"), TEXT, "Who?", is_answer=True),
    ]
    with student_of(add_bos=False) as model:
        assert [lesson.pair.response for lesson in Teacher(model).teach(items)] == [" Finch keeps"]
    with student_of(add_bos=True) as model:
        found = Teacher(model).teach(items)
        assert [lesson.response for lesson in found] == [[ord("X")], list(b" Finch keeps")]
        before = [256, *TEXT.encode()]
        gain = log_likelihood(model, before, [ord("X")])[0] - log_likelihood(model, [256], [ord("X")])[0]
        assert found[0].pair.gain == pytest.approx(gain, abs=2e-4)


def test_rows_are_those_that_predict_a_response() -> None:
    with student_of() as model:
        found = Teacher(model).teach(ITEMS)
    rows = response_rows(found).tolist()
    starts = itertools.accumulate((len(lesson) for lesson in found), initial=0)
    expected = []
    for start, lesson in zip(starts, found, strict=False):
        expected += [start + i - 1 for i in range(len(lesson.query), len(lesson))]
    assert rows == expected


def test_no_more_is_told_than_there_are_words() -> None:
    with student_of() as model:
        (lesson,) = Teacher(model, top_k=100_000).teach(ITEMS[:1])
    assert lesson.tokens.shape[1] == model.vocabulary
    torch.testing.assert_close(lesson.log_probs.exp().sum(-1), torch.ones(len(lesson.response)))


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("kind", ["gpt2", "llama3", "gemma", "llama2", "metaspace"])
def test_queries_are_tokenised_as_sessions_do(kind: str, chat: bool) -> None:
    tokenizer = trained(kind)
    try:
        tokenizer.chat_template = CHAT_TEMPLATE if chat else None
        with student_of(tokenizer=tokenizer, vocab_size=1000) as model:
            items = [
                Elicited(Pair("My dear Mr. Bennet", " said his lady", "cloze"), "a truth\n\n", "My dear"),
                Elicited(Pair("What is a truth?", " a wife", "questions"), "", "What?", is_answer=True),
            ]
            cloze, answer = Teacher(model).teach(items)
            assert cloze.query == [*model.coder.bos, *model.coder.encode("My dear Mr. Bennet")]
            assert cloze.response == model.coder.encode_after(" said his lady")
            session = Session(
                model, policy=FullAttention(), system=None, chunk=512, surprisal=False, seed=None
            )
            assert answer.query == session.to_answer("What is a truth?", keep=True).queue
    finally:
        tokenizer.chat_template = None


def test_an_answer_ends_with_the_token_that_ends_a_turn_wherever_it_stands() -> None:
    template = CHAT_TEMPLATE.replace("{{ eos_token }}", " {{ eos_token }}")  # as in Llama 2's
    with student_of(chat=True) as model:
        model.tokenizer.chat_template = template
        (lesson,) = Teacher(model).teach([ITEMS[1]])
        assert lesson.response[-1] == 257 and 257 in model.end_tokens
