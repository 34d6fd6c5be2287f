"""What the scripts about memories share: learning for a while, and tables of what was answered."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from common import table

import everlong
from everlong import LLM, MemoryStore
from everlong.errors import MemoryGateError
from everlong.evaluation.adapted import adapted
from everlong.evaluation.recall import Recall
from everlong.evaluation.statistics import share_interval
from everlong.memory.adapter import Adapter
from everlong.memory.elicitation import make_generators
from everlong.memory.lessons import Teacher
from everlong.memory.progress import LearnProgress
from everlong.memory.recipes import Recipe, make_recipe
from everlong.memory.segments import segments
from everlong.memory.writer import Writer
from everlong.models.loading import LoadedModel
from everlong.reading.attached import AttachedModel

SHARE = 0.1  # of a text that is read beside a memory
COSTS = ("pairs", "seconds")
RAW_TEXT: dict[str, Any] = {
    **{"generators": ("text",), "selection": "all", "targets": "hard"},
    "continuations": 0,  # what they teach is how it is to have read the text
}
"""Changes to the recipe "infinite-icl" that make it next-token training on the text."""
AS_MANY_STEPS = 10
"""Passes through a raw text of some 250 tokens, beside anchors, for about as many steps as a memory takes."""


@contextmanager
def learned(
    loaded: LoadedModel, text: str, seed: int, **changes: Any
) -> Iterator[tuple[LoadedModel, dict[str, float]]]:
    """Learn a text by "infinite-icl" with changes; yield the model that knows it, and what learning took.

    The store is one for all texts of a process, as users have it: what the model writes by itself is kept.
    """
    with everlong.load(loaded.model, tokenizer=loaded.tokenizer) as llm:
        memory = llm.memorize(text, "learned", seed=seed, store=_store(), force=True, replace=True, **changes)
    cost = dict(zip(COSTS, (len(memory.pairs()), memory.record.seconds), strict=True))
    with adapted(loaded, str(memory.path)) as known:
        yield known, cost


@cache
def _store() -> MemoryStore:
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return MemoryStore(folder)


@contextmanager
def with_adapter(loaded: LoadedModel, adapter: Adapter) -> Iterator[LoadedModel]:
    """Yield the model with an adapter, as plain PEFT loads it."""
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(Path(folder), loaded.name)
        with adapted(loaded, folder) as known:
            yield known


def attached(llm: LLM) -> AttachedModel:
    """Return what the steps of learning take, of a loaded model."""
    return AttachedModel(llm.handle, llm.tokenizer, llm.name, llm.weights)


def gate(loaded: LoadedModel, text: str) -> dict[str, Any]:
    """Measure what reading a text is worth to the model, and whether learning it would be refused.

    Returns
    -------
    dict
        "gain", in nats per token by kind of pair; "refused", with which words, or None.
    """
    recipe: Recipe = make_recipe()
    gains: dict[str, list[float]] = {}
    with everlong.load(loaded.model, tokenizer=loaded.tokenizer) as llm:
        model = attached(llm)
        writer = Writer(model)
        for segment in segments([text], model.coder, recipe.segment_tokens):
            for generator in make_generators(recipe.generators):
                for lesson in Teacher(model).teach(list(generator.elicit(segment, writer))):
                    gains.setdefault(generator.name, []).append(lesson.pair.gain or 0.0)
        found = {name: sum(some) / len(some) for name, some in gains.items()}
        return {"gain": found, "refused": _refusal(llm, text)}


def _refusal(llm: LLM, text: str) -> str | None:
    """Return what the gate says against a text; None: nothing, so that learning began."""

    class LearningBeganError(Exception):
        pass

    def on_progress(progress: LearnProgress) -> None:
        if progress.stage == "learn":
            raise LearningBeganError

    with tempfile.TemporaryDirectory() as folder:
        try:
            llm.memorize(text, "refused", store=MemoryStore(folder), progress=on_progress)
        except MemoryGateError as error:
            return str(error)
        except LearningBeganError:
            return None
    raise AssertionError("learning neither began nor was refused")


def gate_line(gates: Sequence[dict[str, Any]]) -> str:
    """Return what :func:`gate` found of several texts, as a sentence; nothing of none."""
    if not gates:
        return ""
    kinds = dict.fromkeys(kind for row in gates for kind in row["gain"])
    gains = {kind: [row["gain"][kind] for row in gates if kind in row["gain"]] for kind in kinds}
    worth = ", ".join(f"{sum(some) / len(some):.2f} to {kind} pairs" for kind, some in gains.items())
    refused = [row["refused"] for row in gates if row["refused"]]
    said = f': "{refused[0]}"' if refused else ""
    return (
        f"The gate, asked about {len(gates)} of them: reading adds {worth}, in nats per token. "
        f"It would have refused {len(refused)}{said}."
    )


def counts(found: Recall) -> dict[str, list[int]]:
    """Return right answers and probes, by form."""
    return {form: [found.of(form).right, len(found.of(form).answered)] for form in found.forms}


def recall_table(rows: Sequence[dict[str, Any]], forms: Sequence[str], whole: str) -> list[str]:
    """Return the table of what was answered, in percent, a line for each thing that a model had.

    Of how many texts stands there, too, of the form that has most: lines may be of different ones.

    Parameters
    ----------
    rows : sequence of dict
        By what the model had: :func:`counts`.
    forms : sequence of str
        The columns.
    whole : str
        How the names of lines begin whose best is 100 in the last column: those with the whole text.
    """
    found = answered(rows, forms)
    means = {name: mean(by_form) for name, by_form in found.items()}
    best = max((value for name, value in means.items() if name.startswith(whole)), default=0.0)
    cells = [
        [
            name,
            str(max(map(len, by_form.values()))),
            *(share(by_form[form]) for form in forms),
            f"{100 * means[name]:.0f}",
            f"{100 * means[name] / best:.0f}" if best else "",
        ]
        for name, by_form in found.items()
    ]
    return table(["what the model has", "texts", *forms, "mean", "of the best with the whole"], cells)


def answered(
    rows: Sequence[dict[str, Any]], forms: Sequence[str]
) -> dict[str, dict[str, list[Sequence[int]]]]:
    """Return the counts of all rows by what the model had, and by form."""
    names = dict.fromkeys(name for row in rows for name in row if name not in COSTS)
    return {
        name: {form: [row[name][form] for row in rows if form in row.get(name, ())] for form in forms}
        for name in names
    }


def cost_table(learned: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return the table of how many texts were learned in each way, and what that took on the median."""
    cells = [
        [way, str(len(rows)), *(f"{median(row[what] for row in rows):,.0f}" for what in COSTS)]
        for way, rows in learned.items()
        if rows
    ]
    return table(["learned by", "texts", *COSTS], cells)


def share(found: Sequence[Sequence[int]]) -> str:
    """Return a share with its interval, in percent, of counts taken together; empty: there are none."""
    if not found:
        return ""
    interval = share_interval(*(sum(each[i] for each in found) for i in (0, 1)))
    return f"{100 * interval.mean:.0f} ({100 * interval.low:.0f} to {100 * interval.high:.0f})"


def mean(by_form: dict[str, list[Sequence[int]]]) -> float:
    """Return the mean over those forms of which there are counts."""
    shares = [
        sum(right for right, _ in some) / sum(of for _, of in some) for some in by_form.values() if some
    ]
    return sum(shares) / len(shares)
