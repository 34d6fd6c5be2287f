"""Which memory answers: the one whose own pairs are most like the question, if it makes the model surer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from everlong.errors import ConfigurationError
from everlong.memory.folder import Memory
from everlong.memory.lexical import FUNCTION_WORDS, LexicalIndex, words_of
from everlong.memory.recalling import foreign, recall_memories
from everlong.memory.record import AUTO
from everlong.memory.store import MemoryStore
from everlong.reading.attached import AttachedModel
from everlong.reading.memories import Memories

LEAST_LIKENESS = 0.2
"""How like a question a memory must be: what its best pair scores, as a share of the question's own words.

Measured with a handbook and three documents of invented people, apart from the benchmark's. At 0.2, 17 of 20
questions about the handbook and all 249 about the people find the right memory, and 3 of 20 questions of
general knowledge and 6 of 18 everyday ones find one, which the gate then judges. At 0.3 these are 15, 227,
3 and 4.
"""
SURER = 0.5
"""What the entropy of an answer's first token must fall to with a memory, as a share of that without.

An adapter makes a model surer of nearly everything, for it has learned to answer briefly: of 20 questions
about the handbook and 16 others the entropy fell for all (gemma-3-270m, from 2.7 to 5.9 nats). Of the 17
that find the memory it fell to half for 13, among them all that were answered right with it; of 6 others that
do, for 3.
"""


class Routing:
    """Chooses for each question the memory that is about it, or none.

    An adapter that is always on harms what is unrelated, so two things must hold. One of the memory's own
    pairs is like the question: BM25 over the pairs of all memories, without function words, divided by what a
    pair of the question's own words would score, is at least :data:`LEAST_LIKENESS`. And the memory makes the
    model surer: the entropy of the answer's first token falls below :data:`SURER` of that without.

    Parameters
    ----------
    model : AttachedModel
        The model that learned them.
    memories : sequence of Memory
        To choose from.
    store : MemoryStore
        Where they are.
    names : sequence of str
        What they were asked for by; kept in saved sessions.
    """

    def __init__(
        self, model: AttachedModel, memories: Sequence[Memory], store: MemoryStore, names: Sequence[str]
    ) -> None:
        self.names = tuple(names)
        self.memories = tuple(memories)
        self._model = model
        self._store = store
        self._recalled: dict[str, Memories] = {}
        pairs = [(memory, pair) for memory in memories for pair in memory.pairs()]
        self._owners = [memory for memory, _ in pairs]
        self._index = LexicalIndex(f"{pair.query}\n{pair.response}" for _, pair in pairs)

    def most_like(self, text: str) -> tuple[Memory, float] | None:
        """Return the memory with the pair that is most like a text, and how like it is; None: no word is."""
        query = " ".join(word for word in words_of(text) if word not in FUNCTION_WORDS)
        found = self._index.search(query, 1)
        if not found:
            return None
        number, score = found[0]
        return self._owners[number], score / self._index.full_score(query)

    def choose(self, text: str) -> Memories | None:
        """Return the memory that a text is about, put on the model; None: none is.

        Raises
        ------
        MemoryStoreError
            Its files were deleted or damaged meanwhile.
        """
        found = self.most_like(text)
        if found is None or found[1] < LEAST_LIKENESS:
            return None
        memory = found[0]
        if memory.name not in self._recalled:
            self._recalled[memory.name] = recall_memories(self._model, [memory], None, self._store)
        return self._recalled[memory.name]

    def is_surer(self, with_memories: Tensor, without: Tensor) -> bool:
        """Whether the next token's logits (vocabulary,) have much less entropy with memories than without."""
        return entropy(with_memories) < SURER * entropy(without)


def entropy(logits: Tensor) -> float:
    """Return the entropy of the distribution that logits (vocabulary,) stand for, in nats."""
    logs = logits.double().log_softmax(-1)
    return float(-(logs.exp() * logs).nansum())


def known_memories(
    model: AttachedModel,
    memories: str | Sequence[str | Memory],
    weights: Sequence[float] | None,
    store: MemoryStore,
) -> Memories | Routing:
    """Put memories on a model, or what chooses them.

    Parameters
    ----------
    model, weights, store
        As of :func:`~everlong.memory.recalling.recall_memories`.
    memories : "auto" or sequence of str or Memory
        "auto": those are chosen from that are in the store now and that the model can use.
        A sequence that begins with "auto": the others in it are chosen from.

    Raises
    ------
    UnknownNameError, ConfigurationError
        As of :func:`~everlong.memory.recalling.recall_memories`; or weights were given for what is chosen.
    """
    asked = [AUTO] if memories == AUTO else memories
    if isinstance(asked, str) or AUTO not in asked:
        return recall_memories(model, asked, weights, store)
    if weights is not None:
        raise ConfigurationError(
            "memories that are chosen for each question have no weights: leave memory_weights or 'auto' out"
        )
    named = [memory for memory in asked if memory != AUTO]
    found = [store.get(memory) if isinstance(memory, str) else memory for memory in named]
    base_hash = model.weights_hash
    for memory in found:
        if memory.record.kind != "lora":
            raise ConfigurationError(
                f"memory {memory.name!r} is a {memory.record.kind}: it is named, not chosen"
            )
        if memory.record.base_hash != base_hash:
            raise ConfigurationError(foreign(memory, model.name))
    if not named:
        ours = "lora", base_hash
        found = [memory for memory in store.list() if (memory.record.kind, memory.record.base_hash) == ours]
    return Routing(model, found, store, [AUTO, *(memory.name for memory in found if named)])
