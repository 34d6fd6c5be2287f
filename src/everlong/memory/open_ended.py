"""What a model writes of its own accord, having read a segment: a summary, conclusions, more of the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from everlong.memory.elicitation import GENERATORS, Generator
from everlong.memory.lessons import Elicited
from everlong.memory.pairs import Pair
from everlong.memory.segments import Segment
from everlong.memory.writer import Writer


class _Written(Generator):
    """Pairs whose responses the model writes behind the whole segment, one for each query."""

    tokens: int

    def queries(self, segment: Segment) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield queries, and the numbers of the sentences they are about."""
        raise NotImplementedError

    def elicit(self, segment: Segment, writer: Writer) -> Iterator[Elicited]:
        """Yield a pair for each query that the model has something to say to."""
        beginning = segment.text + "\n\n"
        asked = list(self.queries(segment))
        if not asked:
            return
        texts = writer.write(beginning, [query for query, _ in asked], self.tokens, stop=("\n\n",))
        for (query, about), text in zip(asked, texts, strict=True):
            if text.strip():
                yield Elicited(Pair(query, text, self.name, segment.number, about), beginning, query)


@GENERATORS.register("summary")
@dataclass(frozen=True)
class Summary(_Written):
    """The segment in few words, asked for by how it begins.

    Parameters
    ----------
    tokens : int
        That the summary may have.
    """

    name: ClassVar[str] = "summary"
    tokens: int = 96

    def queries(self, segment: Segment) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield one query."""
        words = segment.text.split()
        begin = " ".join(words[: min(12, len(words) // 2)])  # of a short one, not all
        yield f'Summary of the text that begins "{begin} …":', tuple(range(len(segment.sentences)))


@GENERATORS.register("reasoning")
@dataclass(frozen=True)
class Reasoning(_Written):
    """What follows from each sentence, with its reason.

    Parameters
    ----------
    tokens : int
        That each chain may have.
    """

    name: ClassVar[str] = "reasoning"
    tokens: int = 40

    def queries(self, segment: Segment) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield a query a sentence."""
        for number, raw in enumerate(segment.sentences):
            if len(raw.split()) >= 3:
                yield f"{' '.join(raw.split())} It follows, step by step, that", (number,)


@GENERATORS.register("continuation")
@dataclass(frozen=True)
class Continuation(_Written):
    """How the model goes on behind each sentence, knowing the others.

    Parameters
    ----------
    tokens : int
        That each continuation may have.
    """

    name: ClassVar[str] = "continuation"
    tokens: int = 40

    def queries(self, segment: Segment) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield a query a sentence: the sentence."""
        for number, raw in enumerate(segment.sentences):
            if len(raw.split()) >= 3:
                yield " ".join(raw.split()), (number,)
