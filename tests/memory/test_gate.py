"""What a text is worth to a model: what lets it through, and what it is told otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from everlong.errors import MemoryGateError
from everlong.memory import infinite_icl
from everlong.memory.elicitation import Generator
from everlong.memory.gate import Worth, weighed, without_worth
from everlong.memory.infinite_icl import InfiniteICL
from everlong.memory.lessons import Elicited
from everlong.memory.pairs import Pair
from everlong.memory.progress import Progress
from everlong.memory.segments import Segment
from everlong.memory.writer import Writer
from tests.memory.students import student_of
from tests.memory.test_infinite_icl import TEXT, recipe_of, same, with_gains

SEGMENT = Segment(0, ("Orla keeps bees. ", "Finn paints boats. ", "Ada sells tea."), 20)
WRITER: Any = object()  # the generators below ask nothing of it


@dataclass
class Asking(Generator):
    """Answers with the text before it, and without, as it is told to."""

    reading: Sequence[str] = ()
    without: Sequence[str] = ()
    asked: list[tuple[int, str]] = field(default_factory=list)
    name = "asking"

    def elicit(self, segment: Segment, writer: Writer) -> Iterator[Elicited]:
        for number, sentence in enumerate(segment.sentences):
            who, _, what = sentence.strip().strip(".").split()[:3]
            pair = Pair(f"What is it with {who}?", f" {what}", self.name, segment.number, (number,))
            yield Elicited(pair, segment.text, pair.query)

    def answers(self, pairs: Sequence[Pair], text: str, writer: Writer) -> list[str] | None:
        self.asked.append((len(pairs), text))
        words = self.reading if text else self.without
        return [words[i % len(words)] for i in range(len(pairs))] if words else [p.response for p in pairs]


def pairs(count: int, gain: float = 1.0, query: str = "What does Orla keep?") -> list[Pair]:
    return [Pair(query, " bees", "asking", 0, (0,), gain) for _ in range(count)]


def test_a_mean_is_worth_it_where_its_interval_is() -> None:
    sure = Worth().with_gains([0.5, 0.75] * 10)
    assert (
        sure.has_gain
        and sure.gain[0] == pytest.approx(0.625)
        and 0.5 < sure.gain[1] < 0.625 < sure.gain[2] < 0.75
    )
    unsure = Worth().with_gains([3.0, -2.6] * 10)
    assert unsure.gain[0] == pytest.approx(0.2) and not unsure.has_gain
    assert Worth().with_gains([3.0, -2.6]).has_gain, "too few to tell"
    assert sure == Worth().with_gains([0.5, 0.75] * 4).with_gains([0.5, 0.75] * 6)


@pytest.mark.parametrize(
    ("asked", "reading", "without", "is_read"),
    [
        *((40, 18, 2, True), (40, 6, 2, False), (40, 30, 28, False), (40, 0, 0, False)),
        *((12, 3, 0, False), (12, 6, 0, True), (7, 0, 0, True), (0, 0, 0, True)),
    ],
)
def test_a_text_is_read_where_it_clearly_helps_to_answer(
    asked: int, reading: int, without: int, is_read: bool
) -> None:
    worth = Worth(40, 40.0, 40.0, asked, reading, without)
    assert worth.is_read == is_read
    share, low, high = worth.answered
    assert low <= share <= high


def test_questions_are_asked_with_the_text_and_without_until_they_are_enough() -> None:
    asking = Asking(reading=("Bees, I think", "bee keeping"), without=("tea",))
    known = weighed({}, [asking], pairs(40), SEGMENT, WRITER, 0)
    assert asking.asked == [(40, SEGMENT.text), (40, "")]
    assert known["asking"] == Worth(40, 40.0, 40.0, 40, 20, 0)
    known = weighed(known, [asking], pairs(40), SEGMENT, WRITER, 0)
    assert asking.asked[2:] == [(8, SEGMENT.text), (8, "")] and known["asking"].asked == 48
    known = weighed(known, [asking], pairs(40), SEGMENT, WRITER, 0)
    assert len(asking.asked) == 4 and known["asking"].pairs == 120
    assert known["asking"].values() == {
        **{"pairs": 120, "gain": 1.0, "gain_low": 1.0, "gain_high": 1.0},
        **{"asked": 48, "reading": 24, "without": 0},
    }


def test_what_does_not_say_what_it_is_about_is_not_asked() -> None:
    asking = Asking()
    weighed(
        {}, [asking], [*pairs(3, query="What is it?"), *pairs(2, query="What of Ada?")], SEGMENT, WRITER, 0
    )
    assert not asking.asked
    assert weighed({}, [asking], pairs(3), SEGMENT, None, 0)["asking"].asked == 0, "nobody to answer"


def test_a_kind_without_worth_is_left_out_and_all_of_them_are_refused() -> None:
    good, bad = Worth().with_gains([0.5] * 9), Worth().with_gains([0.05] * 9)
    assert without_worth({"a": good, "b": bad}, 0) == {"b"}
    with pytest.raises(MemoryGateError, match=r"segment 3: .*0\.05 nats per token .*to 9 pairs.*teacher="):
        without_worth({"b": bad}, 2)
    unread = Worth(40, 40.0, 40.0, 40, 5, 3)
    with pytest.raises(MemoryGateError, match=r"5 of 40 of its own questions.*without it 3 \(\+5 %.*'cloze'"):
        without_worth({"a": good, "c": unread}, 0)


def test_a_model_that_cannot_answer_from_the_text_is_stopped_unless_forced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    who = ("Orla", "Finn", "Ada", "Bram", "Cleo", "Dara", "Egon", "Greta", "Hugo", "Ines")
    text = " ".join(f"{name} keeps thing{number}." for number, name in enumerate(who))
    recipe = recipe_of(generators=("text",), selection="gain", passes=1, anchors=0, segment_tokens=256)
    with student_of() as model:
        for reading, force in ((("nothing",), False), (("nothing",), True), ((), False)):
            asking = Asking(reading=reading, without=("nothing",))
            monkeypatch.setattr(infinite_icl, "make_generators", lambda names, one=asking: [one])
            with_gains(monkeypatch, *[0.5] * 9)
            learner = InfiniteICL(model, recipe, force=force)
            if reading and not force:
                with pytest.raises(MemoryGateError, match="0 of 10 of its own questions"):
                    learner.learn(text)
                continue
            worth = learner.learn(text).account.worth["asking"]
            assert worth.asked == 10 and worth.reading == (0 if reading else 10)


def test_it_is_known_after_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infinite_icl, "make_generators", lambda names: [Asking()])
    recipe = recipe_of(generators=("text",), selection="gain", passes=1, anchors=0)
    with student_of() as model:
        stops: list[Progress] = []
        whole = InfiniteICL(model, recipe, force=True).learn(TEXT, on_segment=stops.append)
        assert stops[0].account.worth["asking"].pairs < whole.account.worth["asking"].pairs
        resumed = InfiniteICL(model, recipe, force=True).learn(TEXT, start=stops[0])
        assert resumed.account.worth == whole.account.worth and same(resumed, whole)
