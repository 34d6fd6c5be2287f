"""Learning in passing: what leaves the window of a reading session goes, by segments, into a memory.

Window and memory together never end: what a query no longer sees, the model knows by heart.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from everlong.errors import ConfigurationError, MemoryGateError, StateError, UnknownNameError
from everlong.memory.adapter import Adapter
from everlong.memory.combine import combine
from everlong.memory.infinite_icl import InfiniteICL
from everlong.memory.memorize import as_one, describe
from everlong.memory.own_texts import OwnTexts
from everlong.memory.progress import LearnProgress, Progress
from everlong.memory.recalling import adapter_name, put_on
from everlong.memory.recipes import Recipe, make_recipe
from everlong.memory.record import AUTO, LONGEST_NAME, Source, check_name, read_record
from everlong.memory.segments import Cutter, Segment
from everlong.memory.store import MemoryStore
from everlong.reading.attached import AttachedModel
from everlong.reading.interrupt import deferred_interrupt
from everlong.reading.memories import Memories
from everlong.reading.reports import Learned

_DEFAULT_NAME = "session"
_VALUES = "values"


@dataclass(frozen=True)
class Learning:
    """How a session learns what leaves its window: ``session.read(text, memorize=Learning("novel"))``.

    Attributes
    ----------
    name : str, optional
        What the memory is called; by default after the file that is read, or else ``session``, with a number
        behind it where that is taken.
    recipe : Recipe or str
        How it is learned; see :mod:`everlong.memory.recipes`.
    seed : int
        Of what is drawn.
    replace : bool
        Whether a memory of that name may be replaced.
    force : bool
        Whether to learn what is worth nothing to the model. A later ``Learning`` may say otherwise.
    store : MemoryStore, optional
        Where it is kept; by default the session's.
    settings : mapping of str to Any, optional
        Changes to the recipe.
    """

    name: str | None = None
    recipe: Recipe | str = "infinite-icl"
    seed: int = 0
    replace: bool = False
    force: bool = False
    store: MemoryStore | None = None
    settings: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.name is not None:
            check_name(self.name)
        if self.made_recipe.kind == "cartridge":
            raise ConfigurationError(
                "a cartridge is not learned in passing: it stands at the beginning of a stream, so that one "
                "that goes on cannot take it; use a recipe of adapters, such as 'infinite-icl', or learn the "
                "text by llm.memorize()"
            )

    @property
    def made_recipe(self) -> Recipe:
        """The recipe with its changes."""
        return make_recipe(self.recipe, **(self.settings or {}))


class PassingLearners:
    """Makes learners for the sessions of one model.

    Parameters
    ----------
    model : AttachedModel
        The model.
    store : MemoryStore
        Where memories are kept that name no other.
    """

    def __init__(self, model: AttachedModel, store: MemoryStore) -> None:
        self._model = model
        self._store = store

    def begin(self, memorize: Any, file: str | None, before: Memories | None) -> PassingLearner:
        """Make one as ``memorize`` asks, for a session that reads a file of that name and knows `before`.

        Raises
        ------
        ConfigurationError
            The name is taken, or cannot name a memory.
        """
        asked = _asked(memorize)
        store = asked.store or self._store
        if asked.name is None:
            asked = replace(asked, name=_free_name(store, file))
        else:
            store.require_free(asked.name, asked.replace)
        return PassingLearner(self._model, replace(asked, store=store), before)

    def restored(self, state: dict[str, Tensor], before: Memories | None) -> PassingLearner:
        """Make one again from what :meth:`PassingLearner.state` returned.

        Raises
        ------
        StateError
            It is not complete.
        """
        try:
            values = json.loads(bytes(state[_VALUES].cpu().numpy()))
            recipe = Recipe.restored(values["recipe"])
            asked = Learning(**{**values["learning"], "recipe": recipe, "store": self._store})
            learner = PassingLearner(self._model, asked, before)
            learner.load(state, values)
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(
                f"what the session learned is not complete in its file: {error!r}; restore an earlier copy"
            ) from error
        return learner


class PassingLearner:
    """Learns a text that comes in pieces into one memory, which grows in the store with each segment.

    Parameters
    ----------
    model : AttachedModel
        The student and its own teacher, memories aside.
    asked : Learning
        How; with a name and a store.
    before : Memories or None
        What the session knows besides. Both are combined, exactly up to a joint rank of 128.
    """

    def __init__(self, model: AttachedModel, asked: Learning, before: Memories | None) -> None:
        assert asked.name is not None and asked.store is not None
        self.memories = before
        self._model = model
        self._asked = asked
        self._name, self._store = asked.name, asked.store
        self._recipe_name = asked.recipe if isinstance(asked.recipe, str) else "custom"
        self._before = before
        self._base_hash = model.weights_hash
        recipe = asked.made_recipe
        with model.attachment.adapters.set_aside():
            texts = OwnTexts(model, self._store.folder)
            self._learner = InfiniteICL(model, recipe, seed=asked.seed, force=asked.force, own_texts=texts)
        self._cutter = Cutter(model.coder, recipe.segment_tokens)
        self._segments: list[Segment] = []  # whole, and not learned yet
        self._progress = Progress()
        self._adapter: Adapter | None = None  # of all that was learned
        self._source = Source("", 0, 0)  # what was learned; its hash is one of hashes, of each segment's
        self._created = datetime.now(UTC).isoformat()  # by this the memory is known again in the store
        self._was_kept = False  # ever
        self._is_kept = True  # as it is now

    def require_same(self, memorize: Any) -> None:
        """Raise unless ``memorize`` asks for this memory; its ``force`` holds from now on.

        Raises
        ------
        ConfigurationError
            It asks for another, or for another way.
        """
        asked = _asked(memorize)
        ours = self._asked
        if asked.name not in (None, ours.name) or (asked.store or self._store).folder != self._store.folder:
            raise ConfigurationError(
                f"this session learns into memory {ours.name!r} already, and into one only: go on with "
                "memorize=True, or begin another session"
            )
        if isinstance(memorize, Learning):
            if (asked.made_recipe, asked.seed) != (self._learner.recipe, ours.seed):
                raise ConfigurationError(
                    f"memory {ours.name!r} was begun with another recipe or seed: go on with memorize=True, "
                    "or begin another session"
                )
            self._learner.force = asked.force

    def take(self, text: str) -> None:
        """Take a piece of the text."""
        self._segments += self._cutter.feed(text)

    def drop(self) -> None:
        """Forget what was taken and is not learned."""
        self._segments = []
        self._cutter.drop()

    def learn(self, progress: Callable[[LearnProgress], None] | None = None, *, rest: bool) -> None:
        """Learn the segments that are whole, or (`rest`) all that was taken, and keep the memory.

        A segment whose learning ends in an error is learned by the next call. One that is worth nothing to
        the model is left out with a warning, unless it would be the first.

        Raises
        ------
        MemoryGateError
            The first segment is worth nothing to the model that reads it.
        NumericalError
            The loss is not finite.
        ConfigurationError
            The memory was replaced by another of its name.
        MemoryStoreError
            It cannot be written: the session knows what it learned, and it is written with the next segment.
        """
        if rest:
            with deferred_interrupt():
                self._segments += self._cutter.finish()
        while self._segments:
            self._learn_first(progress)
        self._keep()

    def report(self) -> Learned:
        """Tell where it stands."""
        waiting = sum(segment.tokens for segment in self._segments) + self._cutter.waiting
        return Learned(self._name, self._progress.segment, self._progress.account.tokens, waiting)

    def state(self) -> dict[str, Tensor]:
        """Return tensors from which :meth:`PassingLearners.restored` makes it again."""
        tensors, progress = self._progress.state()
        asked = {"name": self._name, "seed": self._asked.seed, "replace": self._asked.replace}
        values = {
            "learning": {**asked, "force": self._learner.force},
            "recipe": self._learner.recipe.values(),
            "recipe_name": self._recipe_name,
            "progress": progress,
            "cutter": self._cutter.state(),
            "segments": [asdict(segment) for segment in self._segments],
            "source": asdict(self._source),
            "created": self._created,
            "was_kept": self._was_kept,
            "is_kept": self._is_kept,
        }
        written = bytearray(json.dumps(values).encode())
        return {**tensors, _VALUES: torch.frombuffer(written, dtype=torch.uint8)}

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
        held = {name: tensor.cpu() for name, tensor in tensors.items() if name != _VALUES}
        self._progress = Progress.restored(held, values["progress"])
        self._recipe_name = values["recipe_name"]
        self._cutter.load(values["cutter"])
        self._segments = [
            Segment(each["number"], tuple(each["sentences"]), each["tokens"]) for each in values["segments"]
        ]
        self._source = Source(**values["source"])
        self._created = values["created"]
        self._was_kept, self._is_kept = values["was_kept"], values["is_kept"]
        if self._progress.pairs:
            self._adapter = as_one(self._learner, self._progress)
            self.memories = self._known(self._adapter)

    def _learn_first(self, on_progress: Callable[[LearnProgress], None] | None) -> None:
        segment = self._segments[0]
        try:
            with self._model.attachment.adapters.set_aside():
                after = self._learner.learn_segments([segment], start=self._progress, on_progress=on_progress)
        except MemoryGateError as error:
            if not self._progress.pairs:
                raise
            warnings.warn(f"memory {self._name!r} leaves a segment out: {error}", stacklevel=2)
            after = self._progress.copy()
            after.segment = segment.number + 1
        with deferred_interrupt():
            del self._segments[0]
            has_learned = len(after.pairs) > len(self._progress.pairs)
            self._progress = after
            if has_learned:
                own = Source.of(segment.text, 0)
                both = hashlib.sha256((self._source.sha256 + own.sha256).encode()).hexdigest()
                self._source = Source(both, self._source.characters + own.characters, 0)
                self._adapter, self._is_kept = as_one(self._learner, after), False
                self.memories = self._known(self._adapter)
        self._keep()

    def _known(self, own: Adapter) -> Memories:
        """Put what was learned on the model, with what the session knows besides."""
        before = self._before or Memories((), (), "")
        adapter = own
        if before.names:
            loaded = self._model.attachment.adapters.loaded(before.adapter)
            adapter = combine([Adapter(*loaded), own]).told("what the session knew and what it learned")
        name = adapter_name(before.adapter, [(own, 1.0)])
        return put_on(self._model, (*before.names, self._name), (*before.weights, 1.0), adapter, name)

    def _keep(self) -> None:
        """Write the memory to the store, if something was learned since."""
        if self._is_kept or self._adapter is None:
            return
        is_ours = False
        with suppress(UnknownNameError):  # none is called so
            is_ours = read_record(self._store.path(self._name)).created == self._created
            if self._was_kept and not is_ours:
                raise ConfigurationError(
                    f"memory {self._name!r} is another one now than that which this session learns: rename "
                    "that one, and read on"
                )
        record = describe(
            self._learner,
            self._progress,
            self._adapter,
            self._source,
            name=self._name,
            base_hash=self._base_hash,
            recipe_name=self._recipe_name,
        )
        may_replace = is_ours or (self._asked.replace and not self._was_kept)
        record = replace(record, created=self._created)
        self._store.add(record, self._adapter, self._progress.pairs, replace=may_replace)
        self._was_kept = self._is_kept = True


def _asked(memorize: Any) -> Learning:
    """Return what ``memorize`` asks for."""
    if isinstance(memorize, Learning):
        return memorize
    if memorize is True or isinstance(memorize, str):
        return Learning(None if memorize is True else memorize)
    raise ConfigurationError(
        f"memorize={memorize!r} is neither True, nor a name, nor a Learning(name, recipe=...)"
    )


def _free_name(store: MemoryStore, file: str | None) -> str:
    """Return a name after a file's that no memory has."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", file or "").strip("-._")[: LONGEST_NAME - 8] or _DEFAULT_NAME
    here = list(store.folder.iterdir()) if store.folder.is_dir() else []
    taken = {AUTO, *(path.name.casefold() for path in here)}
    number, name = 1, plain
    while name.casefold() in taken:
        number += 1
        name = f"{plain}-{number}"
    return check_name(name)
