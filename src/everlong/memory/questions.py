"""Questions about a segment, their beginnings forced: small models ask poor ones of themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from everlong.memory.elicitation import GENERATORS, Generator, plain
from everlong.memory.lessons import Elicited
from everlong.memory.pairs import Pair
from everlong.memory.segments import Segment
from everlong.memory.writer import Writer

_ELSEWHERE = (
    ("The copper kettle on the shelf whistles at noon.", "What does the kettle do at noon?", "whistles"),
    ("Rivers in the valley freeze every January.", "When do the rivers freeze?", "every January"),
    ("A heron nests behind the old mill.", "Where does the heron nest?", "behind the old mill"),
    ("The green engine was repaired by a blacksmith.", "Who repaired the engine?", "a blacksmith"),
)
"""Examples of another kind than any document: a passage, a question, its answer."""

_BEGINNING = "".join(f"Text: {text}\nQuestion: {q}\nAnswer: {a}\n\n" for text, q, a in _ELSEWHERE)

_OPENINGS = (
    *("What is", "What does", "Where does", "Where is", "Who", "Which", "What kind of", "How", "When"),
    "Whose",
)


_ANSWER = 16  # tokens


@GENERATORS.register("questions")
@dataclass(frozen=True)
class Questions(Generator):
    """Questions whose beginning is forced, answered reading their sentence.

    The model completes each of several openings after examples of another kind, then answers. A pair is kept
    if the answer stands in the sentence, and not in the question.

    Parameters
    ----------
    openings : tuple of str
        How questions begin: all are tried on each sentence.
    """

    name: ClassVar[str] = "questions"
    openings: tuple[str, ...] = _OPENINGS

    def elicit(self, segment: Segment, writer: Writer) -> Iterator[Elicited]:
        """Yield the pairs that pass the check."""
        asked: list[tuple[int, str, str]] = []  # sentence, passage, question so far
        for number, passage in _passages(segment):
            asked += [(number, passage, opening) for opening in self.openings]
        endings = writer.write(
            _BEGINNING,
            [f"\nQuestion: {opening}" for _, _, opening in asked],
            24,
            stop=("\n", "?"),
            passages=[f"Text: {passage}" for _, passage, _ in asked],
        )
        questions = {
            (number, passage, f"{opening}{ending.rstrip()}?")
            for (number, passage, opening), ending in zip(asked, endings, strict=True)
            if ending.strip()
        }
        ordered = sorted(questions)
        prompts = [f"\nQuestion: {question}\nAnswer:" for _, _, question in ordered]
        answers = writer.write(
            _BEGINNING, prompts, _ANSWER, passages=[f"Text: {passage}" for _, passage, _ in ordered]
        )
        seen: set[tuple[str, str]] = set()
        for (number, passage, question), prompt, answer in zip(ordered, prompts, answers, strict=True):
            answer = answer.strip().rstrip(".")
            about = _sentence_with(answer, segment, number)
            key = (plain(question), plain(answer))
            if about is None or key[1] in key[0] or key in seen:
                continue
            seen.add(key)
            pair = Pair(question, f" {answer}", self.name, segment.number, (about,))
            told = f"Text: {passage}{prompt}"
            yield Elicited(pair, _BEGINNING, told, is_answer=True, untold=_untold(question))

    def answers(self, pairs: Sequence[Pair], text: str, writer: Writer) -> list[str] | None:
        """Return the answers, behind the same examples."""
        if not text:
            return writer.write(_BEGINNING, [_untold(pair.query) for pair in pairs], _ANSWER)
        prompts = [f"\nQuestion: {pair.query}\nAnswer:" for pair in pairs]
        return writer.write(_BEGINNING, prompts, _ANSWER, passages=[f"Text: {text}"] * len(pairs))


def _untold(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def _passages(segment: Segment) -> Iterator[tuple[int, str]]:
    """Yield each sentence with the one before it, which may say whom it is about."""
    previous = ""
    for number, raw in enumerate(segment.sentences):
        sentence = " ".join(raw.split())
        if len(sentence.split()) >= 3:
            yield number, f"{previous} {sentence}".strip()
        previous = sentence


def _sentence_with(answer: str, segment: Segment, number: int) -> int | None:
    """Return in which of a passage's two sentences, the second of that number, an answer stands."""
    words = plain(answer)
    if not words:
        return None
    both = (number, number - 1) if number else (number,)
    return next((i for i in both if words in plain(segment.sentences[i])), None)
