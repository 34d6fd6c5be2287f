"""Speed and memory against stock transformers (SDPA, DynamicCache, the same chunked prefill).

    python benchmarks/speed.py

At each depth a chunk of 512 tokens and 20 decode steps, from caches filled beforehand, the two in turn,
median of 5; below the window whole prompts and decode steps; the whole prefill of the deepest context once
each; and the peak of resident memory above the weights, in a process of its own each. About 25 minutes on 2
CPU cores, which must be quiet: ratios are taken within one run. Every row is kept, so it can be interrupted.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import RESULTS, Rows, in_own_process, table

from everlong.attention import LMInfinite
from everlong.evaluation.resources import peak_bytes, reset_peak, resident_bytes
from everlong.evaluation.speed import decode_seconds, fill, random_ids, rates
from everlong.evaluation.streams import Stream, open_stream
from everlong.models.loading import load_model
from everlong.models.packing import pack

CHUNK, STEPS = 512, 20


def main() -> None:
    """Measure what is missing, and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--depths", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 1024, 1536])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "speed.json")
    parser.add_argument("--peak", nargs=2, metavar=("METHOD", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(json.dumps(prefill_once(options.model, options.window, options.peak[0], int(options.peak[1]))))
        return

    setting = {"model": options.model, "window": options.window, "repeats": options.repeats}
    rows = Rows(options.output, setting)
    models = [load_model(options.model).model for _ in range(2)]
    heads = [model.get_output_embeddings() for model in models]
    policy = LMInfinite(window=options.window)

    def both(stack: ExitStack) -> list[Stream]:
        """Open a stock stream and one of ours, on two copies of the model."""
        return [
            stack.enter_context(open_stream(model, p))
            for model, p in zip(models, (None, policy), strict=True)
        ]

    def at_depth(depth: int) -> dict[str, Any]:
        with ExitStack() as stack:
            streams = both(stack)
            for stream in streams:
                fill(stream, depth)
            held = [sum(stream.bytes().values()) for stream in streams]
            measured = rates(streams, chunk=CHUNK, steps=STEPS, repeats=options.repeats, heads=heads)
            return {"stock": measured[0], "ours": measured[1], "bytes": held}

    def below(tokens: int) -> dict[str, Any]:
        times: dict[str, list[list[float]]] = {"prefill": [[], []], "decode": [[], []]}
        ids = random_ids(models[0].get_decoder(), tokens + STEPS)
        for _ in range(2 * options.repeats + 2):  # the first warms up; differences are small here
            with ExitStack() as stack:
                for number, stream in enumerate(both(stack)):
                    started = time.perf_counter()
                    stream.read(ids[:tokens])
                    times["prefill"][number].append(time.perf_counter() - started)
                    times["decode"][number].append(
                        median(decode_seconds(stream, ids[tokens:], heads[number]))
                    )
        return {key: [median(each[1:]) for each in pair] for key, pair in times.items()}

    def once(method: str, tokens: int) -> dict[str, Any]:
        arguments = ["--model", options.model, "--window", options.window, "--peak", method, tokens]
        result: dict[str, Any] = in_own_process(__file__, *arguments)
        return result

    short = {n: rows.get(f"prompt of {n}", lambda n=n: below(n)) for n in options.prompts}
    deep = {n: rows.get(f"at {n}", lambda n=n: at_depth(n)) for n in options.depths}
    whole = {
        n: {m: rows.get(f"whole {m} {n}", lambda m=m, n=n: once(m, n)) for m in ("stock", "ours")}
        for n in options.depths
    }
    deepest = max(options.depths)
    packing = pack(models[1], "int4")
    packed = {deepest: rows.get(f"packed at {deepest}", lambda: at_depth(deepest))}
    packing.undo()
    rows.write_table("Speed and memory against stock transformers", page(options, short, deep, packed, whole))


def prefill_once(model: str, window: int, method: str, tokens: int) -> dict[str, Any]:
    """Prefill `tokens` random tokens in this process: seconds, and peak memory above the weights."""
    loaded = load_model(model).model
    with open_stream(loaded, None if method == "stock" else LMInfinite(window=window)) as stream:
        ids = random_ids(stream.decoder, tokens, torch.Generator().manual_seed(0))
        stream.read(ids[:8])  # kernels, and the weights paged in
    with open_stream(loaded, None if method == "stock" else LMInfinite(window=window)) as stream:
        before = resident_bytes()
        reset_peak()
        started = time.perf_counter()
        for begin in range(0, tokens, CHUNK):
            stream.read(ids[begin : begin + CHUNK])
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "peak": peak_bytes() - before, "bytes": sum(stream.bytes().values())}


def page(options: Any, short: Any, deep: Any, packed: Any, whole: Any) -> list[str]:
    """Lay the tables out; ratios above 1 are in our favour."""
    lines = [
        f"{options.model}, float32; ours: LMInfinite(window={options.window}); chunks of {CHUNK} tokens. "
        f"Medians of {options.repeats}, the two in turn, the head counted in decode; a ratio above 1 is in "
        "our favour.",
        "",
        *table(
            [
                "context",
                "prefill, tok/s: stock",
                "ours",
                "ratio",
                "decode, ms: stock",
                "ours",
                "ratio",
                "state, MiB: stock",
                "ours",
                "ratio",
            ],
            [
                *([f"{n:,}", *deep_cells(row)] for n, row in deep.items()),
                *([f"{n:,}, ours int4", *deep_cells(row)] for n, row in packed.items()),
            ],
        ),
        "",
        f"Whole prompts within the window (medians of {2 * options.repeats + 1}):",
        "",
        *table(
            ["prompt", "prefill, tok/s: stock", "ours", "ratio", "decode, ms: stock", "ours", "ratio"],
            [[f"{n:,}", *short_cells(n, row)] for n, row in short.items()],
        ),
        "",
        "Whole prefill, once, in a process of its own:",
        "",
        *table(
            ["tokens", "seconds: stock", "ours", "ratio", "peak above weights, MiB: stock", "ours", "ratio"],
            [[f"{n:,}", *whole_cells(row["stock"], row["ours"])] for n, row in whole.items()],
        ),
    ]
    return lines


def deep_cells(row: Any) -> list[str]:
    """One depth's cells."""
    stock, ours = row["stock"], row["ours"]
    prefill = [each["prefill_tokens_per_second"] for each in (stock, ours)]
    decode = [each["decode_ms"] for each in (stock, ours)]
    return [
        *(f"{rate:.0f}" for rate in prefill),
        f"{prefill[1] / prefill[0]:.2f}",
        *(f"{ms:.1f}" for ms in decode),
        f"{decode[0] / decode[1]:.2f}",
        *(f"{held / 2**20:.0f}" for held in row["bytes"]),
        f"{row['bytes'][0] / row['bytes'][1]:.1f}",
    ]


def short_cells(tokens: int, row: Any) -> list[str]:
    """One prompt's cells."""
    prefill, decode = row["prefill"], row["decode"]
    return [
        *(f"{tokens / seconds:.0f}" for seconds in prefill),
        f"{prefill[0] / prefill[1]:.2f}",
        *(f"{1000 * seconds:.1f}" for seconds in decode),
        f"{decode[0] / decode[1]:.2f}",
    ]


def whole_cells(stock: Any, ours: Any) -> list[str]:
    """One whole prefill's cells."""
    return [
        *(f"{each['seconds']:.0f}" for each in (stock, ours)),
        f"{stock['seconds'] / ours['seconds']:.2f}",
        *(f"{each['peak'] / 2**20:.0f}" for each in (stock, ours)),
        f"{stock['peak'] / ours['peak']:.1f}",
    ]


if __name__ == "__main__":
    main()
