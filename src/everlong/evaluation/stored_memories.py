"""What memories of a store recall of what they were learned from, and what that costs elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from everlong.errors import ConfigurationError, MemoryStoreError
from everlong.evaluation.adapted import adapted
from everlong.evaluation.measures import OnStep, Step
from everlong.evaluation.memory_measure import ASKING, Aside, MemoryMeasure, account, asked, probes_key
from everlong.evaluation.memory_section import ALONE, OTHER, OWN, recall_of
from everlong.evaluation.pair_probes import pair_probes
from everlong.evaluation.texts import LIBRARY, digest
from everlong.memory.folder import Memory
from everlong.memory.pairs import Pair
from everlong.memory.recalling import foreign
from everlong.memory.record import Source
from everlong.memory.store import MemoryStore
from everlong.models.loading import LoadedModel
from everlong.reading.source import open_source


@dataclass(frozen=True)
class StoredMemories(MemoryMeasure):
    """What memories of a store recall of what they were learned from.

    Parameters
    ----------
    memories : tuple of str
        Their names. A memory's own pairs are the questions: those that ask, as they are, and of sentences
        one word each.
    store : MemoryStore
        Where they are. Another memory of the model there, if there is one, is asked too. What a memory
        recalls is written into its record.
    """

    memories: tuple[str, ...] = ()
    store: MemoryStore = field(default_factory=MemoryStore)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.memories or len(set(self.memories)) != len(self.memories):
            raise ConfigurationError(f"name each memory once, and at least one: {', '.join(self.memories)}")
        for name in self.memories:
            self.store.get(name)

    def _steps(self, loaded: LoadedModel, aside: Aside) -> list[Step]:
        found = [self.store.get(name) for name in self.memories]
        unrelated = _sha256(self.text)
        for memory in found:
            if memory.record.source.sha256 == unrelated:
                raise ConfigurationError(
                    f"{self.text} is what memory {memory.name!r} was learned from, and forgetting shows on "
                    "another text: name one with --text, or leave it out"
                )
            if memory.record.base_hash != loaded.weights_hash:
                raise ConfigurationError(foreign(memory, loaded.name))
        return [step for memory in found for step in self._of(loaded, aside, memory)]

    def _of(self, loaded: LoadedModel, aside: Aside, memory: Memory) -> list[Step]:
        probes = pair_probes(memory.pairs(), self.seed)
        if not probes:
            raise ConfigurationError(
                f"memory {memory.name!r} keeps no pairs that could be asked: learn its text again with "
                "everlong memorize, or leave out --memory, so that invented facts are learned"
            )
        other = self._other(memory)
        which = f"{memory.name} [{_identity(memory)}], {probes_key(loaded.tokenizer, probes)}"
        about = f"what {memory.name} was learned from"
        asking = len(probes) * ASKING

        def alone(on_step: OnStep) -> dict[str, Any]:
            return {"about": about, "recalls": {ALONE: asked(loaded, probes)}}

        def with_it(on_step: OnStep) -> dict[str, Any]:
            with adapted(loaded, memory.path) as known:
                row = {"recalls": {OWN: asked(known, probes)}, "standing": aside.measured(known)}
            self._write_down(memory, row["recalls"][OWN])
            if other is not None:
                with adapted(loaded, other.path) as known:
                    row["recalls"][f"{OTHER} ({other.name})"] = asked(known, probes)
            return row | {"about": about, "memory": memory.name, "learned": account(memory)}

        against = "" if other is None else f", beside {other.name} [{_identity(other)}]"
        cost = aside.cost + asking * (1 if other is None else 2)
        return [
            Step(f"memory; {which}; alone", f"{memory.name}: asked without it", asking, alone),
            Step(
                f"memory; {which}; with it{against}; {aside.key}",
                f"{memory.name}: asked with it",
                cost,
                with_it,
            ),
        ]

    def _write_down(self, memory: Memory, answers: Sequence[dict[str, Any]]) -> None:
        """Put what a memory recalls into its record, by the form of the question."""
        found = recall_of(answers)
        shares = {form: found.accuracy(form).mean for form in found.forms}
        with suppress(MemoryStoreError, ConfigurationError):  # only read, or another memory by now
            if self.store.get(memory.name).record == memory.record:
                self.store.update(replace(memory.record, recall=shares))

    def _other(self, memory: Memory) -> Memory | None:
        """Return another memory of the same model, of another text: none that was merged with this one."""
        record, own = memory.record, set(map(_asked, memory.pairs()))
        return next(
            (
                other
                for other in self.store.list()
                if other.record.base_hash == record.base_hash
                and other.record.source.sha256 != record.source.sha256
                and not _are_alike(own, set(map(_asked, other.pairs())))
            ),
            None,
        )


def _asked(pair: Pair) -> tuple[str, str]:
    return pair.query, pair.response


def _are_alike(own: set[tuple[str, str]], others: set[tuple[str, str]]) -> bool:
    """Whether most pairs of the smaller set are in the other, too."""
    return 2 * len(own & others) > min(len(own), len(others))


def _sha256(text: str) -> str | None:
    """Return by what records name a text that is a file; None: Python's own sources."""
    if text == LIBRARY:
        return None
    with closing(open_source(Path(text), 0)) as pieces:
        return Source.of("".join(str(piece) for piece in pieces), 0).sha256


def _identity(memory: Memory) -> str:
    return digest(f"{memory.record.source.sha256} {memory.record.created} {memory.record.recipe}")
