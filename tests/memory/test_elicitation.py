"""What is asked about a segment: all of it, nothing that cannot be checked, nothing that gives it away."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from everlong.attention import FullAttention
from everlong.errors import InputError, UnknownNameError
from everlong.memory.elicitation import GENERATORS, Cloze, make_generators, plain
from everlong.memory.lessons import Elicited
from everlong.memory.open_ended import Continuation, Reasoning, Summary
from everlong.memory.questions import Questions
from everlong.memory.segments import Segment, split_sentences
from everlong.memory.writer import Writer
from everlong.reading.session import Session
from tests.memory.students import student_of

TEXT = (
    "Orla Finch keeps bees in Sligo.\n\nStop! She sells honey to Mr. Bennet every Monday. It rained. "
    "- Notes\n奥拉养蜂。The end came in May."
)


def segment_of(text: str, number: int = 3) -> Segment:
    return Segment(number, tuple(split_sentences(text)), len(text))


class Scripted(Writer):
    """Writes what it is told to, and remembers what it was asked."""

    def __init__(self, *rounds: dict[str, str]) -> None:
        self.rounds = list(rounds)
        self.asked: list[tuple[str, list[str], tuple[str, ...]]] = []
        self.tokens = 0

    def write(
        self,
        beginning: str,
        prompts: Sequence[str],
        max_new_tokens: int,
        stop: Sequence[str] = ("\n",),
        *,
        passages: Sequence[str] | None = None,
    ) -> list[str]:
        if passages is not None:
            prompts = [passage + prompt for passage, prompt in zip(passages, prompts, strict=True)]
        self.asked.append((beginning, list(prompts), tuple(stop)))
        script = self.rounds.pop(0)
        return [
            next((text for end, text in script.items() if prompt.endswith(end)), script.get("", ""))
            for prompt in prompts
        ]


def elicited_by(name: str, text: str = TEXT, *rounds: dict[str, str]) -> list[Elicited]:
    writer = Scripted(*(rounds or ({"": " is it"}, {"": " every Monday"})))
    return list(GENERATORS[name]().elicit(segment_of(text), writer))


# --- cloze --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        "One two. Three four. Five six.",
        "Title\n\nOrla keeps bees.\n- honey pots\n- bread rolls",
        "奥拉养蜂。她卖蜂蜜！然后下雨了。",
        "오를라는 벌을 키운다. 비가 왔다.",
        "อรลาเลี้ยงผึ้ง",
        "Ω ω. “Ja,” sa hon.",
    ],
)
def test_every_sentence_is_the_target_of_a_pair(text: str) -> None:
    segment = segment_of(text)
    found = elicited_by("cloze", text)
    for number, raw in enumerate(segment.sentences):
        targets = [item for item in found if item.pair.sentences == (number,)]
        if len(raw.split()) < 2 and raw.isascii():
            assert not targets, "a single word says nothing"
            continue
        assert targets, raw
        for item in targets:
            assert raw.rstrip().endswith(item.pair.response.rstrip()) and item.pair.response.strip()
            assert (item.pair.query + item.pair.response.rstrip()).endswith(raw.strip())


def test_a_sentence_is_asked_for_alone_and_behind_what_stands_before() -> None:
    found = [item.pair for item in elicited_by("cloze", "Orla keeps bees. Stop! She sells honey.")]
    assert [(pair.query, pair.response, pair.sentences) for pair in found] == [
        ("Orla", " keeps bees.", (0,)),
        ("She", " sells honey.", (2,)),
        ("Orla keeps bees. Stop! She", " sells honey.", (2,)),
    ]
    assert {(pair.generator, pair.segment, pair.gain) for pair in found} == {("cloze", 3, None)}


def test_what_stands_between_two_sentences_is_kept_and_the_end_of_a_line_is_learned() -> None:
    found = [item.pair for item in elicited_by("cloze", " In: a\nOut: b\n\nIn: c\nOut: d\n\nIt rained. So.")]
    assert [(pair.query, pair.response) for pair in found] == [
        ("In:", " a\nOut: b\n\n"),
        ("In:", " c\nOut: d\n\n"),
        ("In: a\nOut: b\n\nIn:", " c\nOut: d\n\n"),
        ("It", " rained."),
        ("In: c\nOut: d\n\nIt", " rained."),
    ]


def test_more_words_may_be_given() -> None:
    found = list(Cloze(begin=2).elicit(segment_of("Orla keeps bees. It rained."), Scripted()))
    assert [(item.pair.query, item.pair.response) for item in found] == [("Orla keeps", " bees.")]


# --- questions ----------------------------------------------------------------------------------------

PASSAGE = "Orla Finch keeps bees in Sligo. She sells honey to Mr. Bennet every Monday."


def questions(endings: dict[str, str], answers: dict[str, str], text: str = PASSAGE) -> list[Elicited]:
    return elicited_by("questions", text, endings, answers)


def test_a_question_is_kept_if_its_answer_stands_in_the_sentence() -> None:
    (item,) = questions(
        {"in Sligo.\nQuestion: Where does": " Orla keep bees"}, {"bees?\nAnswer:": " in Sligo."}
    )
    assert item.pair.query == "Where does Orla keep bees?"
    assert item.pair.response == " in Sligo"
    assert item.pair.sentences == (0,) and item.pair.segment == 3 and item.is_answer
    assert item.question.startswith("Text: Orla Finch keeps bees in Sligo.\nQuestion: Where does Orla")
    assert item.question.endswith("?\nAnswer:")
    assert item.untold == "Question: Where does Orla keep bees?\nAnswer:"


@pytest.mark.parametrize(
    ("ending", "answer"),
    [
        (" Orla keep bees", " in Dublin"),  # not in the sentence
        (" Orla keep bees", " every Monday"),  # not in this one
        (" Orla keep bees in Sligo", " Sligo"),  # given away
        (" Orla keep bees in sligo", " SLIGO."),
        (" Orla keep bees", " Slig"),  # a part of a word
        (" Orla keep bees", " "),
        (" Orla keep bees", " ..."),
        ("", " Sligo"),
        ("  ", " Sligo"),
    ],
)
def test_what_cannot_be_checked_is_not_asked(ending: str, answer: str) -> None:
    opening = "Text: Orla Finch keeps bees in Sligo.\nQuestion: Where does"
    assert questions({opening: ending}, {"": answer}) == []


def test_a_question_is_asked_once() -> None:
    found = questions({"": " Orla keep bees"}, {"": " Sligo"}, "Orla Finch keeps bees in Sligo. It did so.")
    asked = [(item.pair.query, item.pair.response) for item in found]
    assert len(asked) == len(set(asked)) == 10


def test_the_sentence_it_is_about_is_one_that_was_read() -> None:
    text = "Sligo is in Ireland. It rained today. Orla keeps bees in Sligo."
    (item,) = questions({"in Sligo.\nQuestion: Where does": " Orla keep bees"}, {"": " Sligo"}, text)
    assert item.pair.sentences == (2,)
    (item,) = questions({"rained today.\nQuestion: Who": " is in Ireland"}, {"": " Sligo"}, text)
    assert item.pair.sentences == (0,)


def test_a_summary_of_few_words_is_not_asked_for_by_all_of_them() -> None:
    (item,) = Summary().elicit(segment_of("Orla keeps bees. It rained."), Scripted({"": " Bees."}))
    assert "rained" not in item.pair.query and "Orla keeps" in item.pair.query


def test_the_sentence_before_is_read_too() -> None:
    writer = Scripted({"every Monday.\nQuestion: Who": " sells honey"}, {"": " Orla Finch"})
    (item,) = Questions(("Who",)).elicit(segment_of(PASSAGE), writer)
    assert item.pair.sentences == (0,)
    beginning, prompts, stop = writer.asked[0]
    assert prompts == [
        "Text: Orla Finch keeps bees in Sligo.\nQuestion: Who",
        f"Text: {PASSAGE}\nQuestion: Who",
    ]
    assert "?" in stop and "\n" in stop
    assert "Orla" not in beginning and beginning.endswith("\n\n") and item.beginning == beginning


def test_short_sentences_are_not_asked_about() -> None:
    writer = Scripted({}, {})
    assert list(Questions().elicit(segment_of("Stop it! Now."), writer)) == []
    assert all(not prompts for _, prompts, _ in writer.asked)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("In Sligo, Mr. Bennet's", " in sligo mr bennet s "), ("…", ""), ("a_b  1,234", " a b 1 234 ")],
)
def test_words_are_compared_plainly(text: str, expected: str) -> None:
    assert plain(text) == expected


# --- what the model writes ----------------------------------------------------------------------------


@pytest.mark.parametrize("generator", [Summary(), Reasoning(), Continuation()], ids=lambda g: g.name)
def test_what_is_written_is_the_response(generator: Any) -> None:
    writer = Scripted({"": " It is about bees."})
    segment = segment_of(TEXT)
    found = list(generator.elicit(segment, writer))
    beginning, prompts, _ = writer.asked[0]
    assert beginning == segment.text + "\n\n"
    assert [item.question for item in found] == prompts == [item.pair.query for item in found]
    for item in found:
        assert item.pair.response == " It is about bees." and item.beginning == beginning
        assert item.pair.generator == generator.name and not item.is_answer and item.pair.sentences
    assert list(generator.elicit(segment, Scripted({"": "  "}))) == [], "nothing was written"


# --- all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(GENERATORS))
def test_the_student_is_not_shown_what_the_teacher_reads(name: str) -> None:
    rounds = [{"": " is it"}, {"": " every Monday"}] if name == "questions" else [{"": " Of bees."}]
    found = elicited_by(name, TEXT, *rounds)
    assert found
    segment = segment_of(TEXT)
    examples = re.findall(r"(?:Text|Question|Answer): ([^\n]+)", found[0].beginning)
    for item in found:
        query = item.pair.query
        assert segment.text not in query and item.beginning.strip() not in query
        assert not any(example in query for example in examples)
        assert "Text:" not in query and "Answer:" not in query
        assert not query or item.pair.response.strip() not in query
        whole = item.beginning + item.question
        assert segment.text in whole or (item.is_answer and item.pair.response.strip() in whole)


@pytest.mark.parametrize("name", list(GENERATORS))
def test_a_segment_that_says_nothing_is_no_error(name: str) -> None:
    assert len(list(GENERATORS[name]().elicit(segment_of("Stop!"), Scripted({}, {})))) <= 1


def test_generators_go_by_name() -> None:
    assert [generator.name for generator in make_generators(["questions", "cloze"])] == ["questions", "cloze"]
    assert all(GENERATORS[name]().name == name for name in GENERATORS)
    with pytest.raises(InputError, match="at least one generator is needed.*cloze"):
        make_generators([])
    with pytest.raises(UnknownNameError, match="'clozes'; did you mean 'cloze'"):
        make_generators(["clozes"])


# --- the writer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("beginning", ["", "Orla keeps bees.\n\n"], ids=["alone", "behind a beginning"])
@pytest.mark.parametrize("add_bos", [True, False], ids=["with a start token", "without"])
def test_each_text_is_written_as_if_it_were_alone(beginning: str, add_bos: bool) -> None:
    prompts = ["Who", "What is", "W", "Where does she keep them"]
    with student_of(add_bos=add_bos, initializer_range=0.6) as model:
        writer = Writer(model, rows=3)
        written = writer.write(beginning, prompts, 12, stop=())
        lengths = 0
        for prompt, text in zip(prompts, written, strict=True):
            session = Session(model, policy=FullAttention(), system=None, chunk=512, surprisal=False, seed=0)
            session.read(torch.tensor([*model.coder.bos, *(beginning + prompt).encode()]))
            alone = session.generate(12)
            assert text == alone.text
            lengths += alone.tokens
        assert writer.tokens == lengths
        assert len(set(written)) > 1
        end = written[3][2:4]
        cut = writer.write(beginning, prompts, 12, stop=(end,))
        assert cut == [text.split(end)[0] for text in written]


@pytest.mark.parametrize("beginning", ["", "Orla keeps bees.\n\n"], ids=["alone", "behind a beginning"])
def test_a_passage_that_several_stand_behind_changes_nothing(beginning: str) -> None:
    prompts, passages = ["Who", "What is", "W", "Where"], ["It rained. ", "She left. ", "It rained. ", ""]
    with student_of(initializer_range=0.6) as model:
        writer = Writer(model, rows=3)
        whole = [passage + prompt for passage, prompt in zip(passages, prompts, strict=True)]
        expected = writer.write(beginning, whole, 12, stop=())
        assert writer.write(beginning, prompts, 12, stop=(), passages=passages) == expected
        assert len(set(expected)) > 2
