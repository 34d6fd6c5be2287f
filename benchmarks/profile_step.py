"""Where a step of writing spends its time: products, attention, head, other operators, and all between them.

    python benchmarks/profile_step.py

SmolLM2 in full windows, with weights of each kind, threads that spin briefly (as the ``everlong`` command has
them); and, in 4 bits, sessions that write together, which a step serves at once. Operators are timed by
PyTorch's profiler, which makes the small ones look somewhat longer than they are, in a second recording, in
which compiled kernels are named to it (but for the MLP's middle). What a step takes is measured without it,
in a recording like any other, and what is left of that is Python, and threads waking. About 10 minutes on 2
CPU cores, which must be quiet.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from common import RESULTS, Rows, in_own_process, table
from together import filled, seconds_together
from torch.profiler import ProfilerActivity, profile, record_function

from everlong.attention import LMInfinite, attach
from everlong.evaluation.speed import decode_seconds, fill, random_ids
from everlong.evaluation.streams import open_stream
from everlong.kernels.calls import KernelFunction
from everlong.models.loading import load_model
from everlong.models.packing import pack

STEPS, REPEATS = 40, 5
WEIGHTS = ("float", "int8", "int4")
TOGETHER = 8
KINDS = {
    "products": ("aten::addmm", "aten::mm", "aten::_weight_int8pack_mm", "aten::_weight_int4pack_mm_for_cpu"),
    "attention": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::bmm",
        "aten::_softmax",
        "everlong::attend",
    ),
    "head": ("quantized::linear_dynamic_fp16",),
}
OTHERS, REST = "other operators", "Python, waking threads"


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--together", type=int, nargs="*", default=[256, 1024], metavar="WINDOW")
    parser.add_argument("--output", type=Path, default=RESULTS / "profile_step.json")
    parser.add_argument("--once", nargs=3, metavar=("WEIGHTS", "WINDOW", "SESSIONS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        weights, *numbers = options.once
        print(json.dumps(measure(options.model, weights, *map(int, numbers))))
        return
    rows = Rows(options.output, {"model": options.model})

    def of(weights: str, window: int, sessions: int) -> Any:
        words = ["--model", options.model, "--once", weights, window, sessions]
        name = f"{weights}, {window}" + (f", {sessions} sessions" if sessions > 1 else "")
        return rows.get(name, lambda: in_own_process(__file__, *words, waiting="spin briefly"))

    cases = [
        *((weights, window, 1) for window in options.windows for weights in WEIGHTS),
        *(("int4", window, TOGETHER) for window in options.together),
    ]
    found = {case: of(*case) for case in cases}
    lines = [
        f"{options.model}, full windows, recorded steps as generate() runs them (stream() looks at the model "
        "after each piece besides), threads that spin briefly, whatever the line above "
        f"says: milliseconds a step, and calls. Medians of {REPEATS} turns, each of {STEPS} steps timed and "
        f"{STEPS} profiled; the float head is among the products, and what attention does between its "
        "products and its softmax is among the other operators. Besides: the share of a step that is "
        "neither products nor attention nor head, of the same turn.",
        "",
        *table(
            [
                "weights",
                "window",
                "sessions",
                "a step",
                *(f"{name} (calls)" for name in (*KINDS, OTHERS)),
                REST,
                "besides",
            ],
            [
                [weights, f"{window:,}", str(sessions), *cells(row)]
                for (weights, window, sessions), row in found.items()
            ],
        ),
    ]
    rows.write_table("Where a step of writing spends its time", lines)


def measure(model: str, weights: str, window: int, sessions: int) -> dict[str, Any]:
    """Milliseconds and calls of each kind in this process, a step."""
    loaded = load_model(model).model
    if weights != "float":
        pack(loaded, weights)  # type: ignore[arg-type]
    with torch.inference_mode(), writing(loaded, window, sessions) as (cache, write):
        recordings = []
        for naming in (nullcontext, kernels_named):
            cache.recorded = None
            with naming():
                for _ in range(2):  # packs, warms up, and records
                    write()
            recordings.append(cache.recorded)
        steps, rounds = [], []
        for _ in range(REPEATS):  # in turn: what a machine can do changes
            cache.recorded = recordings[0]
            steps.append(1000 * median(write()))
            cache.recorded = recordings[1]
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                write()
            rounds.append(by_kind(profiled))
    found = {
        kind: [median(each) for each in zip(*(some[kind] for some in rounds), strict=True)]
        for kind in rounds[0]
    }
    besides = [
        1 - sum(some[kind][0] for kind in KINDS) / step for step, some in zip(steps, rounds, strict=True)
    ]
    return {"step": median(steps), "kinds": found, "besides": median(besides)}


@contextmanager
def writing(model: Any, window: int, sessions: int) -> Iterator[tuple[Any, Callable[[], list[float]]]]:
    """Yield the cache of one session or of several together, and what writes some tokens: seconds of each."""
    head, policy = model.get_output_embeddings(), LMInfinite(window=window)
    if sessions == 1:
        with open_stream(model, policy) as stream:
            fill(stream, window)
            ids = random_ids(stream.decoder, STEPS)
            yield stream.cache, lambda: decode_seconds(stream, ids, head)
        return
    with attach(model, policy) as handle:
        cache = handle.batch(filled(handle, model.get_decoder(), window, sessions)).cache
        yield cache, lambda: seconds_together(handle, cache, head, sessions, STEPS)


@contextmanager
def kernels_named() -> Iterator[None]:
    """Let the profiler see the compiled kernels of what is recorded meanwhile."""
    repeated = KernelFunction.repeated

    def named(function: KernelFunction, *args: Any, out: torch.Tensor) -> Callable[[], None]:
        call, name = repeated(function, *args, out=out), f"everlong::{function.__name__}"

        def run() -> None:
            with record_function(name):
                call()

        return run

    with patch.object(KernelFunction, "repeated", named):
        yield


def by_kind(profiled: profile) -> dict[str, list[float]]:
    """Return milliseconds and calls of each kind, a step."""
    kind_of = {operator: kind for kind, operators in KINDS.items() for operator in operators}
    found = {kind: [0.0, 0.0] for kind in (*KINDS, OTHERS)}
    for event in profiled.key_averages():
        kind = found[kind_of.get(event.key, OTHERS)]
        kind[0] += event.self_cpu_time_total / 1000 / STEPS
        kind[1] += event.count / STEPS
    return found


def cells(row: dict[str, Any]) -> list[str]:
    """One kind of weights' cells."""
    spent = sum(milliseconds for milliseconds, _ in row["kinds"].values())
    return [
        f"{row['step']:.1f}",
        *(f"{milliseconds:.1f} ({calls:,.0f})" for milliseconds, calls in row["kinds"].values()),
        f"{row['step'] - spent:.1f}",
        f"{row['besides']:.0%}",
    ]


if __name__ == "__main__":
    main()
