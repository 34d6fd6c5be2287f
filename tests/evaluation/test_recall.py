"""Recall: scores by form, intervals, pairs, and the contexts a memory is compared with."""

from __future__ import annotations

from typing import Any

import pytest

from everlong.errors import ConfigurationError, InputError
from everlong.evaluation import recall as room
from everlong.evaluation.probes import Probe
from everlong.evaluation.recall import Answered, Recall, context_tail, recall, retrieved_context
from tests import tiny

GOAT, OWL = (
    Probe("Velda keeps a", ("goat",), "completion"),
    Probe("Question: Pet?\nAnswer:", ("owl",), "question"),
)


def told(*rights: bool, probe: Probe = GOAT) -> Recall:
    return Recall(tuple(Answered(probe, probe.answers[0] if right else "cow") for right in rights))


def test_accuracy_is_counted_by_form_and_leniently_if_asked() -> None:
    found = told(True, False) + told(True, True, probe=OWL) + Recall((Answered(OWL, "an old owl"),))
    assert found.forms == ("completion", "question")
    assert (found.right, len(found.answered)) == (3, 5)
    assert found.accuracy().mean == 0.6 and found.accuracy("completion").mean == 0.5
    assert found.accuracy("question").mean == pytest.approx(2 / 3)
    assert found.accuracy("question", lenient=True).mean == 1
    assert found.as_json()["question"]["right"] == 2 and found.as_json()["question"]["of"] == 3


def test_a_difference_is_paired_and_needs_the_same_probes() -> None:
    better, worse = told(True, True, True, False), told(True, False, False, False)
    assert better.above(worse).mean == 0.5 and worse.above(better).mean == -0.5
    assert better.above(worse, "completion") == better.above(worse)
    with pytest.raises(InputError, match="4 and 2"):
        better.above(told(True, True))
    with pytest.raises(InputError, match="Velda"):
        told(True).above(told(True, probe=OWL))


def test_examples_stand_before_the_context_and_only_before_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, str] = {}

    def answers(
        _model: Any, _tokenizer: Any, prompts: list[str], *, context: list[str], **_: Any
    ) -> list[str]:
        asked.update(zip(prompts, context, strict=True))
        return [{GOAT.prompt: "goat", OWL.prompt: "goat"}[prompt] for prompt in prompts]

    monkeypatch.setattr(room, "answers", answers)
    found = recall(None, None, [OWL, GOAT, OWL], context="Text.", examples="Question: x\nAnswer: y\n")
    assert asked == {GOAT.prompt: "Text.", OWL.prompt: "Question: x\nAnswer: y\n\nText."}
    assert [each.is_right for each in found.answered] == [False, True, False]
    recall(None, None, [GOAT, OWL], context=["one", "two"])
    assert asked == {GOAT.prompt: "one", OWL.prompt: "two"}
    with pytest.raises(InputError, match="1 contexts for 2 probes"):
        recall(None, None, [GOAT, OWL], context=["one"])


def test_a_tiny_model_is_asked_in_the_order_of_the_probes() -> None:
    model, tokenizer = tiny.byte_llama()
    found = recall(model, tokenizer, [OWL, GOAT], context="Velda keeps a goat.", max_new_tokens=3)
    assert [each.probe for each in found.answered] == [OWL, GOAT]
    alone = recall(model, tokenizer, [GOAT], context="Velda keeps a goat.", max_new_tokens=3)
    assert found.answered[1] == alone.answered[0]


# --- contexts -----------------------------------------------------------------------------------------


def test_the_tail_is_the_last_share_from_a_whole_word_on() -> None:
    text = "one two three four five six seven eight nine ten"
    assert context_tail(text, 0.2) == "nine ten"
    assert context_tail(text, 0.1) == "ten" and context_tail(text, 1.0) == text
    assert len(context_tail("word " * 1000)) == pytest.approx(500, abs=5)
    with pytest.raises(ConfigurationError, match="above 0"):
        context_tail(text, 0)


class WordsInCommon:
    """An index that counts the words of the query in each piece."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def search(self, query: str, k: int) -> list[tuple[int, float]]:
        scores = [float(len(set(query.split()) & set(piece.split()))) for piece in self.pieces]
        return sorted(enumerate(scores), key=lambda one: -one[1])[:k]


def test_retrieval_fills_the_same_share_with_the_best_pieces_in_the_order_of_the_text() -> None:
    pieces = [f"{name} keeps a {pet}." for name, pet in zip("ABCDEFGHIJ", "cdefghijkl", strict=True)]
    index = WordsInCommon(pieces)
    assert retrieved_context(index, pieces, "pet of F") == "F keeps a h."
    assert retrieved_context(index, pieces, "pet of F and B", 0.2) == "B keeps a d. F keeps a h."
    assert retrieved_context(index, pieces, "F", 0.001) == "F keeps a h."  # one piece at least
    assert retrieved_context(index, pieces, "F", 1.0) == " ".join(pieces)
    with pytest.raises(ConfigurationError, match="at most 1"):
        retrieved_context(index, pieces, "F", 2)
