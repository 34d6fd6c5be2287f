"""What learning a text takes, step by step, beside the naive loop: seconds, and peak memory.

    python benchmarks/memory_cost.py                 # 240 tokens
    python benchmarks/memory_cost.py --people 20     # 480: about a whole segment

Both ways learn the same text of invented facts by InfiniteICL's default generators, selection and schedule,
with the teacher's distributions as targets: Everlong's keeps the 64 likeliest tokens and the rest as one,
the naive loop (naive.py) all of them. The naive loop writes each text by itself, its teacher reads the
segment anew for each pair, and all logits are whole, in float32. Anchors, continuations, readings, elastic
weight consolidation and the gate are left out of both, packed weights too. Each way runs in a process of its
own, and the peak of each step is what was resident at most in it. That both elicit the same pairs with the
same gains is part of the table. About 20 minutes on 2 CPU cores, of which the naive loop takes nearly all.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import naive
import torch
from common import RESULTS, Rows, in_own_process, table
from memories import attached

import everlong
from everlong.evaluation.facts import fact_document
from everlong.evaluation.resources import peak_bytes, reset_peak, resident_bytes
from everlong.memory.consolidation import Schedule, consolidate, student
from everlong.memory.elicitation import make_generators
from everlong.memory.infinite_icl import InfiniteICL
from everlong.memory.lessons import Elicited, Lesson, Teacher
from everlong.memory.recipes import Recipe, make_recipe
from everlong.memory.segments import segments
from everlong.memory.selection import select
from everlong.memory.writer import Writer
from everlong.models.loading import LoadedModel, load_model
from everlong.reading.attached import AttachedModel

WAYS = ("ours", "naive")
STEPS = ("elicit", "teach", "select", "consolidate")
SETTINGS: dict[str, Any] = {
    "targets": "soft",
    **{"anchors": 0, "ewc": 0.0, "continuations": 0, "readings": 0},
}
"""Changes to the recipe "infinite-icl"."""


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--people", type=int, default=10, help="of whom the text tells three facts each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS / "memory_cost.json")
    parser.add_argument("--once", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        torch.set_num_threads(options.threads)
        print(
            json.dumps(
                measure(load_model(options.model), fact_document(0, options.people).text, options.once)
            )
        )
        return
    setting = {key: getattr(options, key) for key in ("model", "people", "threads")}
    rows = Rows(options.output, setting)
    words = [word for key, value in setting.items() for word in (f"--{key}", value)]
    found = {way: rows.get(way, lambda w=way: in_own_process(__file__, *words, "--once", w)) for way in WAYS}
    rows.write_table("What learning a text takes", page(options, found))


def measure(loaded: LoadedModel, text: str, way: str) -> dict[str, Any]:
    """Learn a text in one of the ways, a step at a time."""
    steps: dict[str, list[float]] = {step: [0.0, 0.0] for step in STEPS}

    @contextmanager
    def counted(step: str) -> Iterator[None]:
        reset_peak()
        started = time.perf_counter()
        yield
        seconds, peak = steps[step]
        steps[step] = [seconds + time.perf_counter() - started, max(peak, peak_bytes())]

    with torch.no_grad():
        loaded.model(torch.tensor([[1, 2, 3]]))  # reads all weights, so that they are resident
    recipe = make_recipe(**SETTINGS)
    found: dict[str, float | None] = {}
    tokens = 0
    with everlong.load(loaded.model, tokenizer=loaded.tokenizer, weights="float") as llm:
        model = attached(llm)
        if way == "naive":
            llm.close()  # what is left of it knows the tokens
        with student(model, InfiniteICL(model, recipe).config()) as adapted:
            writer, teach, learn = (ours if way == "ours" else naively)(model, adapted, recipe)
            resident = resident_bytes()
            for segment in segments([text], model.coder, recipe.segment_tokens):
                tokens += segment.tokens
                with adapted.disable_adapter():
                    with counted("elicit"):
                        elicited = [
                            item
                            for generator in make_generators(recipe.generators)
                            for item in generator.elicit(segment, writer)
                        ]
                    with counted("teach"):
                        lessons = teach(elicited)
                found |= {f"{each.pair.query} / {each.pair.response}": each.pair.gain for each in lessons}
                with counted("select"):
                    lessons = select(lessons, recipe, len(segment.sentences), 0).lessons
                with counted("consolidate"):
                    learn(lessons)
    return {"tokens": tokens, "resident": resident, "steps": steps, "gains": found}


Ways: TypeAlias = tuple[Any, Callable[[list[Elicited]], list[Lesson]], Callable[[list[Lesson]], float]]


def ours(model: AttachedModel, adapted: Any, recipe: Recipe) -> Ways:
    """Return what writes, what teaches, and what learns, as Everlong does."""
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    schedule = Schedule(
        passes=recipe.passes,
        batch_tokens=recipe.batch_tokens,
        learning_rate=recipe.learning_rate,
        patience=None,
        hidden_weight=0.0,
        seed=0,
    )
    teacher = Teacher(model, top_k=recipe.top_k)
    return Writer(model), teacher.teach, lambda lessons: consolidate(model, parameters, lessons, schedule)


def naively(model: AttachedModel, adapted: Any, recipe: Recipe) -> Ways:
    """Return the same three of the naive loop."""
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    plain: Any = model.attachment.model
    return (
        naive.Writer(plain, model),
        lambda elicited: naive.teach(plain, model, elicited),
        lambda lessons: naive.learn(adapted, parameters, lessons, recipe, 0),
    )


def page(options: argparse.Namespace, found: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of the page."""
    first, second = (found[way] for way in WAYS)
    both = set(first["gains"]) & set(second["gains"])
    apart = max((abs(first["gains"][pair] - second["gains"][pair]) for pair in both), default=0.0)
    parts = {step: (step,) for step in STEPS}
    parts |= {"all but elicit": STEPS[1:], "all": STEPS}
    return [
        f"{options.model}, {first['tokens']} tokens of invented facts, {options.threads} threads, float "
        f"weights. Pairs elicited: {len(first['gains'])} and {len(second['gains'])}; {len(both)} are the "
        f"same, with gains at most {apart:.4f} nats apart. Memory is the largest that was resident in a "
        "step, and how much of it came on top of the loaded model.",
        "",
        *table(HEADINGS, [[name, *compared(first, second, steps)] for name, steps in parts.items()]),
    ]


HEADINGS = [
    *("step", "s / 1000 tokens", "naive", "faster"),
    *("peak MiB", "naive", "less", "on top MiB", "naive", "less"),
]


def compared(first: dict[str, Any], second: dict[str, Any], steps: Sequence[str]) -> list[str]:
    """Return the cells of some steps."""
    ways = (first, second)
    seconds = [1000 * sum(way["steps"][step][0] for step in steps) / way["tokens"] for way in ways]
    peaks = [max(way["steps"][step][1] for step in steps) / 2**20 for way in ways]
    above = [max(0.0, peak - way["resident"] / 2**20) for peak, way in zip(peaks, ways, strict=True)]
    return [
        *(f"{value:,.1f}" for value in seconds),
        ratio(seconds),
        *(f"{value:,.0f}" for value in peaks),
        ratio(peaks),
        *(f"{value:,.0f}" for value in above),
        ratio(above),
    ]


def ratio(values: Sequence[float]) -> str:
    """Return how many times the second value is the first."""
    return f"{values[1] / values[0]:.1f}x" if values[0] else ""


if __name__ == "__main__":
    main()
