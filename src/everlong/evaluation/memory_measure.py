"""What the long-term memory recalls, and what learning it costs elsewhere: a section of the report.

Either of memories in a store, asked with what they were learned from, or of documents of invented facts that
are learned on the spot.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from everlong.errors import ConfigurationError, InputError
from everlong.evaluation.adapted import adapted
from everlong.evaluation.facts import FactDocument, fact_documents, matching_examples
from everlong.evaluation.forgetting import Standing, standing
from everlong.evaluation.grounded import cloze
from everlong.evaluation.long_inputs import Way
from everlong.evaluation.measures import Measure, OnStep, Section, Step
from everlong.evaluation.memory_section import ALONE, OTHER, OWN, WHOLE, memory_section
from everlong.evaluation.probes import Probe
from everlong.evaluation.recall import Recall, recall
from everlong.evaluation.texts import LIBRARY, haystack
from everlong.memory.folder import Memory
from everlong.memory.pairs import Pair
from everlong.memory.recalling import foreign
from everlong.memory.recipes import make_recipe
from everlong.memory.store import MemoryStore
from everlong.models.loading import LoadedModel

_MOST_PROBES = 40  # of each form
_LONGEST = 6  # words of an answer that is asked for
_TASK = 20  # words left out of the unrelated text
_ASKING = 40  # tokens read in the time that a probe takes, in a batch
_OWN_TEXTS = 30_000  # tokens read in the time that the texts take which a model writes for itself, once
_LEARNING = 120  # tokens read in the time that learning a token takes, each pass


@dataclass(frozen=True)
class _MemoryMeasure(Measure):
    """What both kinds share: an unrelated text, on which forgetting shows.

    Parameters
    ----------
    text : str
        A file, or ``"library"``: Python's own sources; unrelated to what was learned.
    tokens : int
        Of it that are scored, from its beginning.
    seed : int
        Of what is drawn.
    """

    name: ClassVar[str] = "memory"
    has_ways: ClassVar[bool] = False

    text: str = LIBRARY
    tokens: int = 1024
    seed: int = 0

    def steps(self, loaded: LoadedModel, ways: Sequence[Way]) -> list[Step]:
        """Return those of the model as it is, and of each memory."""
        excerpt = haystack(loaded.tokenizer, self.text, self.tokens)
        unrelated = str(loaded.tokenizer.decode(excerpt.ids, skip_special_tokens=True))
        aside = _Aside(excerpt.name, unrelated, cloze(unrelated, _TASK, self.seed))
        if len(excerpt.ids) < 2 or not aside.probes:
            raise InputError(f"{excerpt.name} has no sentence to leave a word out of: name a longer --text")
        first = Step(
            f"memory; unrelated; {aside.key}",
            f"loss on {excerpt.name}, nothing learned",
            len(excerpt.ids) + _TASK * _ASKING,
            lambda _: {"standing": aside.measured(loaded)},
        )
        return [first, *self._steps(loaded, aside)]

    @abstractmethod
    def _steps(self, loaded: LoadedModel, aside: _Aside) -> list[Step]:
        """Return those of each memory."""

    def section(self, rows: Sequence[dict[str, Any]]) -> Section:
        """Return what was recalled, and what was lost of the unrelated text."""
        return memory_section(self.name, rows)


@dataclass(frozen=True)
class StoredMemories(_MemoryMeasure):
    """What memories of a store recall of what they were learned from.

    Parameters
    ----------
    memories : tuple of str
        Their names. A memory's own pairs are the questions: those that ask, as they are, and of sentences
        one word each.
    store : MemoryStore
        Where they are. Another memory of the model there, if there is one, is asked too.
    """

    memories: tuple[str, ...] = ()
    store: MemoryStore = field(default_factory=MemoryStore)

    def __post_init__(self) -> None:
        if not self.memories or len(set(self.memories)) != len(self.memories):
            raise ConfigurationError(f"name each memory once, and at least one: {', '.join(self.memories)}")

    def _steps(self, loaded: LoadedModel, aside: _Aside) -> list[Step]:
        found = [self.store.get(name) for name in self.memories]
        for memory in found:
            if memory.record.base_hash != loaded.weights_hash:
                raise ConfigurationError(foreign(memory, loaded.name))
        return [step for memory in found for step in self._of(loaded, aside, memory)]

    def _of(self, loaded: LoadedModel, aside: _Aside, memory: Memory) -> list[Step]:
        probes = pair_probes(memory.pairs(), self.seed)
        if not probes:
            raise ConfigurationError(
                f"memory {memory.name!r} keeps no pairs that could be asked: learn its text again with "
                "everlong memorize, or leave out --memory, so that invented facts are learned"
            )
        other = self._other(memory)
        which = f"{memory.name} [{_identity(memory)}], {_digest(repr(probes))}"
        about = f"what {memory.name} was learned from"
        asked = len(probes) * _ASKING

        def alone(on_step: OnStep) -> dict[str, Any]:
            return {"about": about, "recalls": {ALONE: _asked(loaded, probes)}}

        def with_it(on_step: OnStep) -> dict[str, Any]:
            with adapted(loaded, memory.path) as known:
                row = {"recalls": {OWN: _asked(known, probes)}, "standing": aside.measured(known)}
            if other is not None:
                with adapted(loaded, other.path) as known:
                    row["recalls"][f"{OTHER} ({other.name})"] = _asked(known, probes)
            return row | {"about": about, "memory": memory.name, "learned": _account(memory)}

        against = "" if other is None else f", beside {other.name} [{_identity(other)}]"
        cost = aside.cost + asked * (1 if other is None else 2)
        return [
            Step(f"memory; {which}; alone", f"{memory.name}: asked without it", asked, alone),
            Step(
                f"memory; {which}; with it{against}; {aside.key}",
                f"{memory.name}: asked with it",
                cost,
                with_it,
            ),
        ]

    def _other(self, memory: Memory) -> Memory | None:
        """Return another memory of the same model, of another text."""
        record = memory.record
        return next(
            (
                other
                for other in self.store.list()
                if other.record.base_hash == record.base_hash
                and other.record.source.sha256 != record.source.sha256
            ),
            None,
        )


@dataclass(frozen=True)
class InventedFacts(_MemoryMeasure):
    """What memories recall of invented facts, which are learned on the spot: that takes minutes a document.

    Parameters
    ----------
    documents : int
        How many are learned, 30 facts each by default.
    people : int
        Whom a document tells three facts of.
    settings : dict
        Changes to the recipe ``"infinite-icl"``.
    """

    documents: int = 1
    people: int = 10
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        make_recipe(**self.settings)
        fact_documents(self.seed, self.documents + 1, self.people)

    def _steps(self, loaded: LoadedModel, aside: _Aside) -> list[Step]:
        recipe = make_recipe(**self.settings)
        every = fact_documents(self.seed, self.documents + 1, self.people)
        steps, store = [], _Scratch()
        for number, document in enumerate(every[:-1]):
            size = len(loaded.tokenizer.encode(document.text))
            asked = len(document.probes()) * _ASKING
            name = f"document {number + 1}"
            which = f"memory; invented {name} [{_digest(document.text)}]"
            learning = size * recipe.passes * _LEARNING + (_OWN_TEXTS if recipe.anchors and not number else 0)
            steps += [
                Step(
                    f"{which}; alone",
                    f"{name}: asked without a memory",
                    2 * asked + size,
                    lambda _, document=document: _unlearned(loaded, document),  # type: ignore[misc]
                ),
                Step(
                    f"{which}; learned [{_digest(repr((recipe.values(), self.seed)))}]; {aside.key}",
                    f"{name}: learned, and asked",
                    learning + 2 * asked + aside.cost,
                    lambda on_step, name=name, document=document, other=every[number + 1]: self._learned(  # type: ignore[misc]
                        loaded, aside, store, name, document, other, on_step
                    ),
                ),
            ]
        return steps

    def _learned(
        self,
        loaded: LoadedModel,
        aside: _Aside,
        scratch: _Scratch,
        name: str,
        document: FactDocument,
        other: FactDocument,
        on_step: OnStep,
    ) -> dict[str, Any]:
        import everlong
        from everlong.memory.progress import LearnProgress

        def told(at: LearnProgress) -> None:
            left = f", {at.seconds_left:,.0f} s left" if at.seconds_left else ""
            on_step(0.95 * at.fraction, f"{at.stage}, {at.pairs} pairs{left}")

        with everlong.load(loaded.model, tokenizer=loaded.tokenizer) as llm:
            memory = llm.memorize(
                document.text,
                "learned",
                seed=self.seed,
                store=scratch.store,
                force=True,
                replace=True,
                progress=told,
                **self.settings,
            )
        with adapted(loaded, memory.path) as known:
            return {
                "about": _INVENTED,
                "recalls": {OWN: _asked(known, document.probes()), OTHER: _asked(known, other.probes())},
                "standing": aside.measured(known),
                "memory": name,
                "learned": _account(memory),
            }


_INVENTED = "invented facts"


class _Scratch:
    """A store for as long as somebody holds it: what a model writes for itself is written once."""

    def __init__(self) -> None:
        import tempfile

        self._folder = tempfile.TemporaryDirectory(prefix="everlong-")
        self.store = MemoryStore(self._folder.name)


@dataclass(frozen=True)
class _Aside:
    """The unrelated text, and words left out of it."""

    name: str
    text: str
    probes: list[Probe]

    @property
    def key(self) -> str:
        return f"{self.name} [{_digest(self.text + repr(self.probes))}]"

    @property
    def cost(self) -> int:
        return len(self.text) // 3 + len(self.probes) * _ASKING

    def measured(self, loaded: LoadedModel) -> dict[str, Any]:
        """Return how a model does on it, as it is kept."""
        found: Standing = standing(loaded.model, loaded.tokenizer, self.text, self.probes)
        return {
            "text": self.name,
            "surprisal": _rounded(found.surprisal),
            "task": kept_answers(found.recall),
        }


def pair_probes(pairs: Sequence[Pair], seed: int = 0) -> list[Probe]:
    """Return what can be asked of the pairs that a memory was learned from.

    Parameters
    ----------
    pairs : sequence of Pair
        Those with a question and a short answer are asked as they are; from sentences, words are left out.
    seed : int
        Same seed, same probes.
    """
    questions, sentences = [], dict[str, None]()
    for pair in pairs:
        if pair.query.rstrip().endswith("?"):
            if 0 < len(pair.response.split()) <= _LONGEST and any(map(str.isalnum, pair.response)):
                prompt = f"Question: {pair.query.strip()}\nAnswer:"
                questions.append(Probe(prompt, (pair.response.strip(),), "question"))
        else:
            sentences[(pair.query + pair.response).strip()] = None
    # A sentence is learned by itself, and again behind the one before it: that one is left out.
    told = [each for each in sentences if not any(each != less and less in each for less in sentences)]
    return [*questions[:_MOST_PROBES], *cloze("\n".join(told), min(_MOST_PROBES, len(told)), seed)]


def kept_answers(found: Recall) -> list[dict[str, Any]]:
    """Return answers as they are kept."""
    return [
        {
            "form": each.probe.form,
            "prompt": each.probe.prompt,
            "answers": list(each.probe.answers),
            "written": each.text,
        }
        for each in found.answered
    ]


def _asked(loaded: LoadedModel, probes: Sequence[Probe]) -> list[dict[str, Any]]:
    return kept_answers(recall(loaded.model, loaded.tokenizer, probes, in_turns=True))


def _unlearned(loaded: LoadedModel, document: FactDocument) -> dict[str, Any]:
    """Ask a model that learned nothing, without the document, and reading it behind examples."""
    model, tokenizer, probes = loaded.model, loaded.tokenizer, document.probes()
    examples = matching_examples(0)
    read = recall(model, tokenizer, probes, context=document.text, examples=examples, in_turns=True)
    return {"about": _INVENTED, "recalls": {ALONE: _asked(loaded, probes), WHOLE: kept_answers(read)}}


def _account(memory: Memory) -> dict[str, Any]:
    record = memory.record
    return {
        "kind": record.kind if record.rank is None else f"{record.kind}, rank {record.rank}",
        "tokens": record.source.tokens,
        "pairs": len(memory.pairs()),
        "seconds": record.seconds,
        "bytes": memory.bytes,
    }


def _identity(memory: Memory) -> str:
    return _digest(f"{memory.record.source.sha256} {memory.record.created} {memory.record.recipe}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _rounded(surprisal: Tensor) -> list[float]:
    return [round(value, 4) for value in surprisal.tolist()]
