"""What keeps a student what it was: texts that the model writes by itself, or after a segment, and reading.

A model that learns to answer without a text unlearns other things on the way. What it says of other matters
changes: so it is held, by the base model's whole distribution, to what that writes. In texts of the kind of
the one it learned it sees that one everywhere: so it is held, in what the base model writes having read it,
to what that then expects. And it no longer looks at what stands before a question, as nothing did while it
learned: though another text is before it, it answers from memory. So it goes on reading, of worlds in which
its memory is wrong.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence

from everlong.memory.elicitation import WORD
from everlong.memory.lessons import Elicited, Lesson
from everlong.memory.lexical import FUNCTION_WORDS
from everlong.memory.pairs import Pair
from everlong.memory.segments import Segment
from everlong.memory.writer import Writer
from everlong.reading.sampling import Sampling

UNRELATED, CONTINUED, READING = "unrelated", "continued", "reading"
"""What their pairs call themselves."""

_TOKENS = 48  # of an unrelated text
_CONTINUED = 64  # tokens of what follows a segment
_PASSAGE, _MOST = 48, 96  # words of what is read, about, and at most
_ALIKE = 3  # pairs that are asked about one passage
_WORD = re.compile(r"\w+")
_PROSE = (
    *("The", "In the morning", "There are many", "Once upon a time", "She said that", "According to", "My"),
    *("The number of", "When it rains", "A good way to", "He was born in", "It is", "For example", "We"),
    *("Water", "It was a", "They", "If you want to", "The river", "His father", "Note that", "Dear"),
)
_OPENINGS = (
    *_PROSE,
    *("Question: What is the capital of France?\nAnswer:", "Question: Who", "Q: ", "User: ", "What is"),
    *("How do I", "1.", "- ", "Ingredients:\n-", "1. Preheat the oven to", "Chapter 1\n\n", "Title:"),
    *('"I don\'t know," said', "Mr.", "He looked at her and", "Hello,", "Thank you for", "Yesterday, the"),
    *("Abstract. We", "In 1914,", "The company", "Scientists have", "Theorem 1.", "Let x be", "https://"),
    *("import", "def ", "class ", "for i in range(", "#include <", "SELECT ", "<html>\n", '{\n  "', "# "),
    *("    return ", "public static void", "| Name | Age |\n", "To install", "La ", "Der ", "El "),
)
"""How unrelated texts begin; the base model writes on."""


def unrelated(writer: Writer, count: int) -> list[Elicited]:
    """Return texts that the model writes by itself, drawn from all that it may write.

    They are not written greedily: what a model finds likeliest by itself goes round in circles.

    Parameters
    ----------
    writer : Writer
        Of the base model.
    count : int
        How many, a few less where it writes nothing.
    """
    return [
        Elicited(Pair(opening, text, UNRELATED), "", None)
        for opening, text in _drawn(writer, "", _OPENINGS, count, _TOKENS, 0)
    ]


def continuations(segment: Segment, writer: Writer, count: int, seed: int) -> list[Elicited]:
    """Return texts that the model writes after a segment, to be expected as by the model that has read it.

    So what the segment tells stays likely in them, where the base model alone would deny it.

    Parameters
    ----------
    segment : Segment
        The segment.
    writer : Writer
        Of the base model.
    count : int
        How many, a few less where it writes nothing.
    seed : int
        Of what is drawn.
    """
    beginning = segment.text + "\n\n"
    return [
        Elicited(Pair(opening, text, CONTINUED, segment.number), beginning, opening)
        for opening, text in _drawn(writer, beginning, _PROSE, count, _CONTINUED, seed)
    ]


def _drawn(
    writer: Writer, beginning: str, openings: Sequence[str], count: int, tokens: int, seed: int
) -> Iterator[tuple[str, str]]:
    """Yield the opening of each text, and what was drawn to follow it, so many tokens."""
    if not count:
        return
    begun = [openings[number % len(openings)] for number in range(count)]
    draws = [Sampling(temperature=1.0, seed=seed + number) for number in range(count)]
    texts = writer.write(beginning, begun, tokens, stop=(), sampling=draws)
    for opening, text in zip(begun, texts, strict=True):
        if text.strip():
            yield opening, text


def readings(
    segment: Segment, lessons: Sequence[Lesson], each: int, turns: int, draws: random.Random
) -> list[Elicited]:
    """Return pairs about a segment, asked again in another world, behind a passage that tells of it.

    In that world names and numbers are exchanged, in the passage and in the pair alike: the response is what
    the passage says, and what is learned of the segment is no answer. It need not make sense. Passages in
    which nothing is exchanged are left out, and with them whole texts in scripts without capitals.

    Parameters
    ----------
    segment : Segment
        The segment.
    lessons : sequence of Lesson
        About it; those that are not about one sentence, of at most some hundred words, are left out.
    each : int
        How many are wanted for a turn; no more than there are such lessons.
    turns : int
        For how many turns, one after another; the same pair may come in several worlds.
    draws : random.Random
        Of worlds, passages and pairs.
    """
    sizes = [len(WORD.findall(sentence)) for sentence in segment.sentences]
    about: dict[int, list[Lesson]] = {}
    for lesson in lessons:
        sentences = lesson.pair.sentences
        if len(sentences) == 1 and sizes[sentences[0]] <= _MOST:
            about.setdefault(sentences[0], []).append(lesson)
    count = turns * min(each, sum(map(len, about.values())))
    found: list[Elicited] = []
    for _ in range(count):
        if len(found) == count:
            break
        passage = _passage(sizes, draws.choice(sorted(about)), draws)
        exchange = exchanged(segment.text, draws)
        told = "".join(segment.sentences[number] for number in passage).strip()
        text = exchange(told)
        if text == told:
            continue
        some = [lesson for number in passage for lesson in about.get(number, ())]
        for lesson in draws.sample(some, min(_ALIKE, len(some), count - len(found))):
            query, response = exchange(lesson.pair.query), exchange(lesson.pair.response)
            pair = Pair(query, response, READING, segment.number, lesson.pair.sentences)
            found.append(Elicited(pair, "", None, lesson.ends, text if lesson.ends else text + "\n\n"))
    return found


def _passage(sizes: Sequence[int], sentence: int, draws: random.Random) -> range:
    """Return which sentences, of so many words, make a passage around one, which stands anywhere in it."""
    begin, end = sentence, sentence + 1
    while sum(sizes[begin:end]) < _PASSAGE:
        beside = [number for number in (begin - 1, end) if 0 <= number < len(sizes)]
        if not beside:
            break
        number = draws.choice(beside)
        if sum(sizes[begin:end]) + sizes[number] > _MOST:
            break
        begin, end = min(begin, number), max(end, number + 1)
    return range(begin, end)


def exchanged(text: str, draws: random.Random) -> Callable[[str], str]:
    """Return what exchanges the names and the numbers of a text, each for another one of its kind.

    Names are words that are never written small in it, English function words aside; numbers are of a kind
    if they have as many digits. The only one of its kind stays.
    """
    words = list(dict.fromkeys(_WORD.findall(text)))
    written = set(words)
    kinds: dict[int, list[str]] = {}
    for word in words:
        small = word.lower()
        if word.isdigit():
            kinds.setdefault(len(word), []).append(word)
        elif small != word and small not in written and small not in FUNCTION_WORDS:
            kinds.setdefault(0, []).append(word)
    others: dict[str, str] = {}
    for some in kinds.values():
        draws.shuffle(some)
        others.update(zip(some, [*some[1:], some[0]], strict=True))
    return lambda given: _WORD.sub(lambda found: others.get(found[0], found[0]), given)
