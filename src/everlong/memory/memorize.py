"""A text into a memory in a store: read, learned by a recipe, kept; interrupted, it goes on where it was."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

from everlong.errors import InputError
from everlong.memory import cartridge
from everlong.memory.adapter import Adapter
from everlong.memory.combine import combine
from everlong.memory.folder import Memory
from everlong.memory.infinite_icl import InfiniteICL
from everlong.memory.own_texts import OwnTexts
from everlong.memory.progress import LearnProgress, Progress
from everlong.memory.recipes import Recipe
from everlong.memory.record import MemoryRecord, Source, check_name
from everlong.memory.record import Recipe as UsedRecipe
from everlong.memory.store import MemoryStore
from everlong.memory.unfinished import Unfinished
from everlong.reading.attached import AttachedModel
from everlong.reading.source import Source as Readable
from everlong.reading.source import TextPieces, open_source


def memorize(
    model: AttachedModel,
    source: Readable,
    name: str,
    *,
    store: MemoryStore,
    recipe: Recipe,
    recipe_name: str = "",
    seed: int = 0,
    replace_existing: bool = False,
    teacher: AttachedModel | None = None,
    force: bool = False,
    on_progress: Callable[[LearnProgress], None] | None = None,
) -> Memory:
    """Learn a text and keep it; see ``LLM.memorize``, for the user."""
    check_name(name)
    store.require_free(name, replace=replace_existing)
    text = _whole(source, model)
    base_hash = model.weights_hash
    described = Source.of(text, 0)
    helper = None if teacher is None else [teacher.name, teacher.weights_hash]
    unfinished = Unfinished(
        store.folder, described.sha256, base_hash, recipe.values(), seed, helper, model.packed_as
    )
    started = time.perf_counter()
    with model.attachment.adapters.set_aside():
        texts = OwnTexts(model, store.folder)
        learner = InfiniteICL(model, recipe, seed=seed, teacher=teacher, force=force, own_texts=texts)
        progress = learner.learn(
            text, start=unfinished.load(), on_progress=on_progress, on_segment=unfinished.save
        )
        adapter = as_one(learner, progress)
    record = describe(
        learner, progress, adapter, described, name=name, base_hash=base_hash, recipe_name=recipe_name
    )
    record = replace(record, seconds=max(record.seconds, time.perf_counter() - started))
    memory = store.add(record, adapter, progress.pairs, replace=replace_existing)
    unfinished.discard()
    return memory


def describe(
    learner: InfiniteICL,
    progress: Progress,
    adapter: Adapter,
    source: Source,
    *,
    name: str,
    base_hash: str,
    recipe_name: str,
) -> MemoryRecord:
    """Return the record of what a learner made of a source."""
    config: Any = adapter.config
    return MemoryRecord(
        name=name,
        base_model=learner.model.name,
        base_hash=base_hash,
        source=replace(source, tokens=progress.account.tokens),
        segments=progress.segment,
        recipe=UsedRecipe(recipe_name or "custom", {**learner.recipe.values(), "seed": learner.seed}),
        rank=None if learner.is_cartridge else config.r,
        kind=learner.recipe.kind,
        measured={
            "worth": {kind: worth.values() for kind, worth in progress.account.worth.items()},
            "sentences": progress.account.sentences,
            "uncovered": progress.account.uncovered,
        },
        seconds=sum(progress.account.seconds.values()),
    )


def as_one(learner: InfiniteICL, progress: Progress) -> Adapter:
    """Return what was learned as a single adapter."""
    adapters = [
        Adapter(learner.config(len(tensors.get(cartridge.WEIGHTS, ()))), tensors)
        for tensors in progress.adapters
    ]
    if len(adapters) == 1:
        return adapters[0]
    return combine(adapters).told(f"the adapters of {len(adapters)} segments")


def _whole(source: Any, model: AttachedModel) -> str:
    """Read a source to its end."""
    opened = open_source(source, model.vocabulary)
    if not isinstance(opened, TextPieces):
        opened.close()
        raise InputError("a memory is learned from text, not from token ids: decode them first")
    with closing(opened):
        return "".join(opened)
