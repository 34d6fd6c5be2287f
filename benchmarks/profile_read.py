"""Where reading spends its time: products, attention in its parts, other operators, and all between them.

    python benchmarks/profile_read.py

SmolLM2 reads pieces of 512 tokens, as a session does, under LM-Infinite, whose window is full. Operators are
timed by PyTorch's profiler, to which compiled kernels are named; what a piece takes is measured without it,
in turn, and what is left of that is Python. Beside the rate of each kind of operator, in operations that the
definition needs, stands that of a large matrix product. Some two minutes on 2 CPU cores, which must be quiet.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from common import RESULTS, Rows, in_own_process, table
from torch.profiler import ProfilerActivity, profile, record_function

from everlong.attention import LMInfinite, parts
from everlong.evaluation.rooflines import Rooflines
from everlong.evaluation.speed import fill, prefill_seconds, random_ids
from everlong.evaluation.streams import open_stream
from everlong.evaluation.work import work_of
from everlong.kernels.blocks import Seen, Triangle
from everlong.models import rotary
from everlong.models.loading import load_model

PIECE, REPEATS = 512, 15
PRODUCTS = ("aten::addmm", "aten::mm")
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
KERNEL = "everlong::attend_blocks"
KINDS = {
    "products": "products with weights",
    "at once": "attention to all parts at once, by a compiled kernel",
    "whole": "attention to keys that all of a group of queries see",
    "triangle": "attention to keys that come or go within the group",
    "sinks": "attention to sinks, each at its distance",
    "others": "other operators",
}


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--output", type=Path, default=RESULTS / "profile_read.json")
    parser.add_argument("--once", type=int, metavar="WINDOW", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(measure(options.model, options.once)))
        return
    rows = Rows(options.output, {"model": options.model})
    lines = [
        f"{options.model}, float weights, pieces of {PIECE} tokens, threads that spin briefly, whatever the "
        f"line above says. Medians of {REPEATS} turns, in each of which a large matrix product, a piece, and "
        "a piece under the profiler were timed. Needed are the operations of the definition: of a triangle "
        "half of what its rectangle has. Of the matrix rate: of the same turn.",
    ]
    for window in options.windows:
        words = ["--model", options.model, "--once", window]
        found = rows.get(
            f"a window of {window}", lambda w=words: in_own_process(__file__, *w, waiting="spin briefly")
        )
        lines += ["", f"## A window of {window:,}", "", *page(found)]
    rows.write_table("Where reading spends its time", lines)


@torch.inference_mode()
def measure(model: str, window: int) -> dict[str, Any]:
    """Milliseconds of a piece, what it needs, and both of each kind of operator, in this process."""
    loaded = load_model(model).model
    work, policy = work_of(loaded), LMInfinite(window=window)
    rooflines = Rooflines(torch.device("cpu"), torch.float32)
    turns = []
    with open_stream(loaded, policy) as stream:
        fill(stream, window)
        ids = random_ids(stream.decoder, PIECE)
        stream.read(ids)
        for _ in range(REPEATS):
            rate, milliseconds = rooflines.flops(), 1000 * prefill_seconds(stream, ids)
            with (
                kernels_named() as noted,
                profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled,
            ):
                stream.read(ids)
            found = by_kind(profiled.key_averages(True), policy.sinks)
            found["at once"][2] = sum(noted)
            turns.append((rate, milliseconds, found))
    needed = work.prefill_flops(stream.seen, PIECE, window)
    kinds = {
        kind: {
            "milliseconds": median(found[kind][0] for _, _, found in turns),
            "calls": turns[0][2][kind][1],
            "flops": turns[0][2][kind][2],
            "share": median(
                found[kind][2] / max(found[kind][0], 1e-9) * 1000 / rate for rate, _, found in turns
            ),
        }
        for kind in KINDS
    }
    return {
        "milliseconds": median(milliseconds for _, milliseconds, _ in turns),
        "flops": needed,
        "rate": median(rate for rate, _, _ in turns),
        "share": median(needed / milliseconds * 1000 / rate for rate, milliseconds, _ in turns),
        "kinds": kinds,
    }


@contextmanager
def kernels_named() -> Iterator[list[int]]:
    """Let the profiler see compiled kernels; yield the operations that each call to attend needs."""
    needed, attend, turn = list[int](), parts.attend_blocks, rotary.turn

    def attend_named(some: list[Seen], scaling: float) -> torch.Tensor:
        for query, keys, _, visible in some:
            rectangle = 4 * query.numel() * keys.shape[2]
            needed.append(rectangle // 2 if isinstance(visible, Triangle) else rectangle)
        with record_function(KERNEL):
            return attend(some, scaling)

    def turn_named(*given: torch.Tensor) -> torch.Tensor:
        with record_function("everlong::turn"):
            return turn(*given)

    with patch.object(parts, "attend_blocks", attend_named), patch.object(rotary, "turn", turn_named):
        yield needed


def by_kind(events: Iterable[Any], sinks: int) -> dict[str, list[float]]:
    """Return milliseconds, calls and needed operations of each kind, of events grouped by shapes."""
    found: dict[str, list[float]] = {kind: [0.0, 0, 0] for kind in KINDS}
    for event in events:
        kind, flops = kind_of(event.key, event.input_shapes, sinks)
        found[kind][0] += event.self_cpu_time_total / 1000
        found[kind][1] += event.count
        found[kind][2] += event.count * flops
    return found


def kind_of(operator: str, shapes: list[list[int]], sinks: int) -> tuple[str, int]:
    """Return an operator's kind, and the operations that one call of it needs."""
    if operator in PRODUCTS:
        (n, inner), (_, outer) = shapes[-2:] if operator == "aten::mm" else shapes[1:3]
        return "products", 2 * n * inner * outer
    if operator != ATTENTION:
        return ("at once" if operator == KERNEL else "others"), 0
    (batch, heads, n, d), (_, _, keys, _) = shapes[:2]
    rectangle = 4 * batch * heads * n * keys * d
    if keys == n:
        return "triangle", rectangle // 2
    return ("sinks" if keys == sinks else "whole"), rectangle


def page(row: dict[str, Any]) -> list[str]:
    """Return the lines of one window."""
    kinds, total = row["kinds"], row["milliseconds"]
    rest = total - sum(kind["milliseconds"] for kind in kinds.values())

    def cells(name: str, milliseconds: float, flops: float, share: float, calls: str = "") -> list[str]:
        of_time = f"{milliseconds / total:.0%}"
        if not flops:
            return [name, f"{milliseconds:.0f}", of_time, calls, "", "", ""]
        rate = f"{flops / milliseconds / 1e6:.0f}"
        return [name, f"{milliseconds:.0f}", of_time, calls, f"{flops / 1e9:.1f}", rate, f"{share:.0%}"]

    return [
        *table(
            ["", "ms", "of the time", "calls", "needed, GFLOP", "GFLOP/s", "of the matrix rate"],
            [
                cells("a piece", total, row["flops"], row["share"]),
                *(
                    cells(
                        KINDS[name], kind["milliseconds"], kind["flops"], kind["share"], f"{kind['calls']:,}"
                    )
                    for name, kind in kinds.items()
                    if kind["calls"]
                ),
                cells("Python, waking threads", rest, 0, 0),
            ],
        ),
        "",
        f"The matrix rate: {row['rate'] / 1e9:.0f} GFLOP/s.",
    ]


if __name__ == "__main__":
    main()
