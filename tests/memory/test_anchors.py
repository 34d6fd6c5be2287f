"""What keeps a student what it was: worlds in which names are exchanged, and reading in them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from everlong.memory.anchors import (
    CONTINUED,
    READING,
    UNRELATED,
    continuations,
    exchanged,
    readings,
    unrelated,
)
from everlong.memory.consolidation import loss_of
from everlong.memory.lessons import Lesson, Teacher, as_tokens
from everlong.memory.segments import Segment
from everlong.memory.writer import Writer
from everlong.models.head import Head
from everlong.reading.attached import AttachedModel
from tests.memory.students import lesson, plain_logits, student_of

TEXT = (
    "Orla Finch keeps 12 bees in Sligo. She sells honey to Bennet since 1987. "
    "The finch sings. Bennet was born in 1954 and has 30 boats. No rain in Sligo, it is 7."
)
SENTENCES = tuple(part + ". " for part in TEXT.rstrip(".").split(". "))
SEGMENT = Segment(3, SENTENCES, 60)
LESSONS = [
    lesson("Orla", " Finch keeps 12 bees in Sligo.", sentences=(0,)),
    lesson("She", " sells honey to Bennet since 1987.", sentences=(1,)),
    replace(lesson("Who has 30 boats?", " Bennet", "questions", sentences=(3,)), ends=True),
    lesson("No", " rain in Sligo, it is 7.", sentences=(4,)),
    lesson("", TEXT, "text", sentences=(0, 1, 2, 3, 4)),
    lesson("What is it about?", " bees", "summary"),
]


@pytest.fixture
def model() -> Iterator[AttachedModel]:
    with student_of() as made:
        yield made


# --- another world ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_names_and_numbers_are_exchanged_for_their_kind(seed: int) -> None:
    exchange = exchanged(TEXT, random.Random(seed))
    kinds = [{"Orla", "Sligo", "Bennet", "No"}, {"1987", "1954"}, {"12", "30"}]
    for kind in kinds:
        assert {exchange(word) for word in kind} == kind
        assert all(exchange(word) != word for word in kind)
    for word in ("Finch", "finch", "She", "The", "honey", "7", "Sligoes", "orla"):
        assert exchange(word) == word
    other = exchange(TEXT)
    assert other != TEXT and len(other.split()) == len(TEXT.split())
    assert exchange("Orla, 12") == f"{exchange('Orla')}, {exchange('12')}"


def test_worlds_differ_and_the_same_draws_give_the_same() -> None:
    worlds = [exchanged(TEXT, random.Random(seed))(TEXT) for seed in range(8)]
    assert len(set(worlds)) > 2
    assert exchanged(TEXT, random.Random(1))(TEXT) == worlds[1]


@pytest.mark.parametrize(
    "text", ["", "nothing to exchange here", "The one and only Orla of 1987", "蜜蜂在五月"]
)
def test_what_has_no_other_of_its_kind_stays(text: str) -> None:
    assert exchanged(text, random.Random(0))(text) == text


# --- reading in it ------------------------------------------------------------------------------------


def test_pairs_are_asked_again_behind_a_passage_that_tells() -> None:
    found = readings(SEGMENT, LESSONS, 4, 10, random.Random(0))
    assert len(found) == 40 and len({(one.passage, one.pair.query) for one in found}) > 12
    asked = {one.pair.response for one in LESSONS}
    for one in found:
        assert one.pair.generator == READING and one.pair.segment == 3
        assert one.is_answer == (one.pair.query.endswith("?"))
        assert one.passage.endswith("\n\n") != one.is_answer
        assert one.pair.response.strip() in one.passage
        assert one.pair.query.strip("?").split()[-1] in one.passage
        assert one.pair.response not in asked or one.pair.response.strip() == "Bennet"
    assert {one.pair.sentences for one in found} == {(0,), (1,), (3,), (4,)}
    assert found == readings(SEGMENT, LESSONS, 4, 10, random.Random(0))


def test_passages_are_short_whole_sentences_anywhere_around() -> None:
    sentences = tuple(f"Number {i} has {' '.join(['a word'] * 9)} more. " for i in range(10))
    lessons = [lesson(f"Number {i}", " has.", sentences=(i,)) for i in range(10)]
    found = readings(Segment(0, sentences, 200), lessons, 10, 6, random.Random(0))
    sizes = {one.passage.count("Number") for one in found}
    assert sizes == {3}, "48 words or a little more, of sentences of 22"
    assert len(found) == 60
    places = {one.passage.index(one.pair.query) for one in found}
    assert len(places) >= 3


@pytest.mark.parametrize("lessons", [[], LESSONS[-2:]])
def test_without_pairs_about_a_sentence_nothing_is_read(lessons: list[Lesson]) -> None:
    assert readings(SEGMENT, lessons, 5, 5, random.Random(0)) == []


def test_no_more_are_made_than_asked_for_or_than_there_are_lessons_in_each_turn() -> None:
    counts = [len(readings(SEGMENT, LESSONS, each, 3, random.Random(0))) for each in range(8)]
    assert counts == [0, 3, 6, 9, 12, 12, 12, 12]


@pytest.mark.parametrize(
    "text", ["nothing to exchange is written here at all, is it?", "蜜蜂在五月睡觉。" * 3, "Orla has 5 bees."]
)
def test_where_nothing_can_be_exchanged_nothing_is_read(text: str) -> None:
    assert not readings(Segment(0, (text,), 20), [lesson("", text, sentences=(0,))], 3, 3, random.Random(0))


@pytest.mark.parametrize("word", [" word", "蜜蜂在"])
def test_long_sentences_are_not_read(word: str) -> None:
    long, short = f"Orla and Bennet{word * 95}. ", f"Orla met Bennet {word * 20}. "
    lessons = [lesson("Orla", " and", sentences=(0,)), lesson("Orla", " met", sentences=(1,))]
    found = readings(Segment(0, (long, short), 400), lessons, 4, 4, random.Random(0))
    assert found and {one.pair.sentences for one in found} == {(1,)}
    assert all(" and " not in one.passage for one in found)


@pytest.mark.parametrize("chat", [False, True])
def test_questions_stand_behind_their_passage_as_sessions_ask(chat: bool) -> None:
    with student_of(chat=chat) as model:
        elicited = readings(SEGMENT, LESSONS[:4], 4, 5, random.Random(0))
        lessons = [as_tokens(model, one) for one in elicited]
        for one, made in zip(elicited, lessons, strict=True):
            text = bytes(token for token in made.query if token < 256).decode()
            assert text.index(one.passage) < text.rindex(one.pair.query)
            assert ("Question: " in text) == (one.is_answer and not chat)
            assert bytes(x for x in made.response if x < 256).decode().startswith(one.pair.response)
            assert made.ends == one.is_answer
        alone = as_tokens(model, replace(elicited[0], passage=""))
        assert len(alone) < len(lessons[0])


def test_the_base_model_itself_has_nothing_to_learn_of_what_it_is_held_to(model: AttachedModel) -> None:
    lessons = Teacher(model, top_k=16).teach(unrelated(Writer(model), 6), gain=False)
    assert len(lessons) > 3 and all(one.pair.gain is None for one in lessons)
    assert loss_of(model, Head(model.attachment.model), lessons, 256) == pytest.approx(0, abs=1e-6)
    for one in lessons[:3]:
        logs = plain_logits(model, [*one.query, *one.response]).log_softmax(-1)[len(one.query) - 1 : -1]
        torch.testing.assert_close(one.log_probs, logs.topk(16).values, atol=1e-5, rtol=1e-5)


def test_what_follows_a_segment_is_expected_as_by_who_has_read_it(model: AttachedModel) -> None:
    elicited = continuations(SEGMENT, Writer(model), 30, 0)
    lessons = Teacher(model, top_k=16).teach(elicited, gain=False)
    assert len(lessons) == len(elicited) > 20 and all(one.pair.gain is None for one in lessons)
    read = [*model.coder.bos, *model.coder.encode(f"{SEGMENT.text}\n\n")]
    for one in lessons[::10]:
        assert one.query == [*model.coder.bos, *model.coder.encode(one.pair.query)]
        ids = [*read, *model.coder.encode_after(one.pair.query), *one.response]
        logs = plain_logits(model, ids).log_softmax(-1)[-len(one.response) - 1 : -1]
        torch.testing.assert_close(one.log_probs, logs.topk(16).values, atol=1e-5, rtol=1e-5)


def test_what_follows_a_segment_is_drawn_and_begins_in_many_ways(model: AttachedModel) -> None:
    few, more = continuations(SEGMENT, Writer(model), 5, 7), continuations(SEGMENT, Writer(model), 60, 7)
    assert more[: len(few)] == few, "the same seed, the same texts"
    assert len({one.pair.response for one in more}) == len(more) > 50
    assert len({one.pair.query for one in more}) > 20
    assert {(one.pair.generator, one.pair.segment, one.pair.sentences) for one in more} == {
        (CONTINUED, 3, ())
    }
    other = continuations(SEGMENT, Writer(model), 5, 8)
    assert other[0].pair.query == few[0].pair.query and other[0].pair.response != few[0].pair.response
    read_other = continuations(Segment(3, SENTENCES[1:], 60), Writer(model), 5, 7)
    assert read_other[0].pair.response != few[0].pair.response
    assert continuations(SEGMENT, Writer(model), 0, 7) == []


def test_unrelated_texts_begin_in_many_ways_and_are_drawn(model: AttachedModel) -> None:
    few, more = unrelated(Writer(model), 3), unrelated(Writer(model), 90)
    assert more[: len(few)] == few, "the same for everyone"
    assert len({one.pair.query for one in more}) > 50
    assert len({one.pair.response for one in more}) == len(more) > 80
    assert all(one.pair.generator == UNRELATED and one.question is None for one in more)
    assert unrelated(Writer(model), 0) == []
