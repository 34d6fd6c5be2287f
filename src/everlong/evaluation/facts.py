"""Documents of invented facts about invented people, and what can be asked about them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from everlong.errors import ConfigurationError
from everlong.evaluation.invented import invented_names
from everlong.evaluation.probes import Probe
from everlong.evaluation.relations import RELATIONS, Relation

EXAMPLES_ELSEWHERE = """\
The ferry Marrow leaves at noon and carries forty cars. The lighthouse has nine floors. The harbour bell is \
made of bronze. The museum opens on Tuesdays and shows old maps.

Question: When does the ferry leave?
Answer: noon

Question: What is the harbour bell made of?
Answer: bronze

Question: How many floors does the lighthouse have?
Answer: nine

Question: What does the museum show?
Answer: old maps
"""
"""A text of another kind with questions about it: they show what an answer looks like, and nothing else."""

_BY_NAME = {relation.name: relation for relation in RELATIONS}
_FOR_EXAMPLES = 4  # values of each list, its last, that only examples have


@dataclass(frozen=True)
class Fact:
    """One thing that is true of one person.

    Attributes
    ----------
    person : str
        An invented name.
    relation : str
        The name of one of `RELATIONS`.
    value : str
        What is true.
    before : str
        The beginning of its sentence, up to the value.
    """

    person: str
    relation: str
    value: str
    before: str


@dataclass(frozen=True)
class FactDocument:
    """A text of facts.

    Attributes
    ----------
    sentences : tuple of str
        Each tells one or two facts about one person.
    facts : tuple of Fact
        In the order in which they are told.
    ambiguous : frozenset of (str, str)
        Relations and values that are true of several people: they are not asked for the person.
    """

    sentences: tuple[str, ...]
    facts: tuple[Fact, ...]
    ambiguous: frozenset[tuple[str, str]] = frozenset()

    @property
    def text(self) -> str:
        """The whole text, one paragraph."""
        return " ".join(self.sentences)

    def probes(self) -> list[Probe]:
        """Return each fact as a completion, as a question, and in reverse where one person is the answer."""
        found = []
        for fact in self.facts:
            found.append(Probe(fact.before, _spellings(fact), "completion"))
            found.append(Probe(_question(fact), _spellings(fact), "question"))
            if (fact.relation, fact.value) not in self.ambiguous:
                found.append(Probe(_reverse_question(fact), (fact.person,), "reverse"))
        return found


def fact_document(seed: int, people: int = 10, facts_each: int = 3) -> FactDocument:
    """Return a document; by default of 30 facts in about 240 tokens.

    Parameters
    ----------
    seed : int
        Same seed, same document.
    people : int
        Invented people in it.
    facts_each : int
        Facts about each, at most as many as there are `RELATIONS`.
    """
    return fact_documents(seed, 1, people, facts_each)[0]


def fact_documents(seed: int, count: int, people: int = 10, facts_each: int = 3) -> list[FactDocument]:
    """Return documents that share no person and no town.

    Parameters
    ----------
    seed : int
        Same seed, same documents.
    count : int
        Of documents.
    people, facts_each : int
        As in :func:`fact_document`.

    Raises
    ------
    ConfigurationError
        There are not so many names, or a number is too small or too large.
    """
    if count < 1 or people < 1 or not 1 <= facts_each <= len(RELATIONS):
        raise ConfigurationError(
            f"{count} documents with {facts_each} facts about each of {people} people cannot be made: "
            f"at least one of each, and at most {len(RELATIONS)} facts about one person"
        )
    draw = random.Random(f"facts {seed}")
    supply = _Supply(draw)
    told = [[_about_one(draw, supply, facts_each) for _ in range(people)] for _ in range(count)]
    often = Counter(
        (fact.relation, fact.value) for document in told for _, facts in document for fact in facts
    )
    return [
        FactDocument(
            tuple(sentence for sentences, _ in document for sentence in sentences),
            tuple(fact for _, facts in document for fact in facts),
            frozenset(key for key, times in often.items() if times > 1),
        )
        for document in told
    ]


def matching_examples(seed: int, questions: int = 8, reverse: int = 4) -> str:
    """Return a short text about other invented people, and questions of the same forms about it, answered.

    Put before a document and the questions about it, this is the best prompt for reading that was found. It
    tells no answer: its people and its values are in no document.

    Parameters
    ----------
    seed : int
        Same seed, same examples.
    questions, reverse : int
        Examples that ask for the value, each of another relation, and examples that ask for the person.
    """
    draw = random.Random(f"examples {seed}")
    supply = _Supply(draw, for_examples=True)
    relations = draw.sample(RELATIONS, len(RELATIONS))
    told = [_about_one(draw, supply, 2, relations[at : at + 2]) for at in range(0, len(relations), 2)]
    facts = [fact for _, about in told for fact in about]
    shown = [(_question(fact), fact.value) for fact in facts[:questions]]
    shown += [(_reverse_question(fact), fact.person) for fact in draw.sample(facts, len(facts))[:reverse]]
    draw.shuffle(shown)
    text = " ".join(sentence for sentences, _ in told for sentence in sentences)
    return "\n\n".join([text, *(f"{question} {answer}" for question, answer in shown)]) + "\n"


class _Supply:
    """Names and values not used yet; those that come from a list begin anew when it is used up."""

    def __init__(self, draw: random.Random, *, for_examples: bool = False) -> None:
        self._draw = draw
        self._part = slice(-_FOR_EXAMPLES, None) if for_examples else slice(-_FOR_EXAMPLES)
        self._people = invented_names(draw, "person", for_examples=for_examples)
        self._values = {"home": invented_names(draw, "town", for_examples=for_examples)}

    def person(self) -> str:
        return self._next(self._people, "people")

    def value(self, relation: Relation) -> str:
        if relation.values:
            known = self._values.get(relation.name, iter(()))
            if (value := next(known, None)) is not None:
                return value
            fresh = relation.values[self._part]
            self._values[relation.name] = iter(self._draw.sample(fresh, len(fresh)))
        return self._next(self._values[relation.name], f"values for {relation.name}")

    @staticmethod
    def _next(left: Iterator[str], what: str) -> str:
        if (found := next(left, None)) is None:
            raise ConfigurationError(f"there are no more {what} to invent; make fewer or smaller documents")
        return found


def _about_one(
    draw: random.Random, supply: _Supply, count: int, relations: Sequence[Relation] | None = None
) -> tuple[list[str], list[Fact]]:
    """Tell `count` facts about a new person, two in a sentence."""
    person = supply.person()
    told = [(relation, supply.value(relation)) for relation in relations or draw.sample(RELATIONS, count)]
    sentences, facts = [], []
    for begin in range(0, count, 2):
        sentence = person
        for i, (relation, value) in enumerate(told[begin : begin + 2]):
            before, after = draw.choice(relation.said).split("{}")
            sentence += (" and " if i else " ") + before
            facts.append(Fact(person, relation.name, value, sentence.rstrip()))
            sentence += value + after
        sentences.append(sentence + ".")
    return sentences, facts


def _question(fact: Fact) -> str:
    return f"Question: {_BY_NAME[fact.relation].asked.format(fact.person)}\nAnswer:"


def _reverse_question(fact: Fact) -> str:
    return f"Question: {_BY_NAME[fact.relation].reversed.format(fact.value)}\nAnswer:"


def _spellings(fact: Fact) -> tuple[str, ...]:
    """Return the ways to write a value: a date has two."""
    if fact.relation != "birthday":
        return (fact.value,)
    day, month = fact.value.split()
    return fact.value, f"{month} {day}"
