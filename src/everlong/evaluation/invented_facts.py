"""What memories recall of invented facts, which are learned on the spot, and what that costs elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from tempfile import TemporaryDirectory
from typing import Any

from everlong.evaluation.adapted import adapted
from everlong.evaluation.facts import FactDocument, fact_documents, matching_examples
from everlong.evaluation.measures import OnStep, Step
from everlong.evaluation.memory_measure import ASKING, Aside, MemoryMeasure, account, asked, probes_key
from everlong.evaluation.memory_section import ALONE, OTHER, OWN, SHOWN, WHOLE
from everlong.evaluation.texts import digest
from everlong.memory.recipes import Recipe, make_recipe
from everlong.memory.store import MemoryStore
from everlong.models.loading import LoadedModel

_ABOUT = "invented facts"
_OWN_TEXTS = 30_000  # tokens read in the time that the texts take which a model writes for itself, once
_LEARNING = 120  # tokens read in the time that learning a token takes, each pass


@dataclass(frozen=True)
class InventedFacts(MemoryMeasure):
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
        super().__post_init__()
        assert self._recipe and self._told  # refused here, where they cannot be made

    @cached_property
    def _recipe(self) -> Recipe:
        return make_recipe(**self.settings)

    @cached_property
    def _told(self) -> list[FactDocument]:
        """The documents, and one more that is asked for and never learned."""
        return fact_documents(self.seed, self.documents + 1, self.people)

    def _steps(self, loaded: LoadedModel, aside: Aside) -> list[Step]:
        _check(loaded, self._recipe, self._told)
        # What a model writes for itself is written once: all documents are learned in one store.
        scratch = TemporaryDirectory(prefix="everlong-")
        return [
            step
            for number, (document, other) in enumerate(pairwise(self._told), 1)
            for step in self._of(loaded, aside, scratch, number, document, other)
        ]

    def _of(
        self,
        loaded: LoadedModel,
        aside: Aside,
        scratch: TemporaryDirectory[str],
        number: int,
        document: FactDocument,
        other: FactDocument,
    ) -> list[Step]:
        recipe, name, probes = self._recipe, f"document {number}", document.probes()
        size, asking = len(loaded.tokenizer.encode(document.text)), len(probes) * ASKING
        learning = size * recipe.passes * _LEARNING + (_OWN_TEXTS if recipe.anchors and number == 1 else 0)
        which = f"{digest(document.text)}, {probes_key(loaded.tokenizer, probes)}"
        how = f"{digest(repr((recipe.values(), self.seed)))}, {probes_key(loaded.tokenizer, other.probes())}"

        def learned(on_step: OnStep) -> dict[str, Any]:
            return self._learned(loaded, aside, scratch, name, document, other, on_step)

        return [
            Step(
                f"memory; invented {name} [{which}]; alone",
                f"{name}: asked without a memory",
                3 * asking + 2 * size,
                lambda _: _unlearned(loaded, document),
            ),
            Step(
                f"memory; invented {name} [{which}]; learned [{how}]; {aside.key}",
                f"{name}: learned, and asked",
                learning + 2 * asking + aside.cost,
                learned,
            ),
        ]

    def _learned(
        self,
        loaded: LoadedModel,
        aside: Aside,
        scratch: TemporaryDirectory[str],
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
                store=MemoryStore(scratch.name),
                force=True,
                replace=True,
                progress=told,
                **self.settings,
            )
        with adapted(loaded, memory.path) as known:
            return {
                "about": _ABOUT,
                "recalls": {OWN: asked(known, document.probes()), OTHER: asked(known, other.probes())},
                "standing": aside.measured(known),
                "memory": name,
                "learned": account(memory),
            }


def _check(loaded: LoadedModel, recipe: Recipe, documents: Sequence[FactDocument]) -> None:
    """Refuse now what learning would refuse after all else was measured."""
    import everlong
    from everlong.memory.cartridge import first_keys
    from everlong.memory.segments import segments
    from everlong.reading.attached import AttachedModel

    with everlong.load(loaded.model, tokenizer=loaded.tokenizer) as llm:
        model = AttachedModel(llm.handle, loaded.tokenizer, loaded.name)
        for document in documents:
            list(segments([document.text], model.coder, recipe.segment_tokens))
        if recipe.kind == "cartridge":
            first_keys(model, documents[0].text, recipe.prefix)


def _unlearned(loaded: LoadedModel, document: FactDocument) -> dict[str, Any]:
    """Ask a model that learned nothing: without the document, reading it, and reading it behind examples."""
    probes, text = document.probes(), document.text
    return {
        "about": _ABOUT,
        "recalls": {
            ALONE: asked(loaded, probes),
            WHOLE: asked(loaded, probes, context=text),
            SHOWN: asked(loaded, probes, context=text, examples=matching_examples(0)),
        },
    }
