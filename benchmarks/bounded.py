"""Memory and time per token while a stream grows to a million tokens: both must stay where they were.

    python benchmarks/bounded.py

A tiny random model reads 1,000,000 tokens under LMInfinite, in about two minutes. After the first 20,000
tokens resident memory may grow by less than 1 %, the bytes the cache reports must be those of the tensors it
really holds, and a chunk at the end must take what it took there (medians over 100 chunks).
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import RESULTS, Rows, table
from transformers import LlamaConfig, LlamaForCausalLM

from everlong.attention import LMInfinite
from everlong.evaluation.resources import resident_bytes
from everlong.evaluation.streams import open_stream

CHUNK = 500


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--settled", type=int, default=20_000, help="tokens after which memory is compared")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=RESULTS / "bounded.json")
    options = parser.parse_args()

    if options.tokens % CHUNK or options.settled % CHUNK or options.tokens < options.settled + 100 * CHUNK:
        parser.error(f"tokens and settled are multiples of {CHUNK}, {100 * CHUNK} or more apart")

    setting = {"tokens": options.tokens, "settled": options.settled, "window": options.window}
    rows = Rows(options.output, setting)
    row = rows.get("LM-Infinite", lambda: measure(**setting))
    growth = row["resident"][1] / row["resident"][0] - 1
    slower = row["milliseconds"][1] / row["milliseconds"][0] - 1
    lines = [
        "A random Llama of 2 layers, 4 heads of 16 dimensions; "
        f"LMInfinite(window={options.window}), chunks of {CHUNK}.",
        "",
        *table(
            ["", f"after {options.settled:,} tokens", f"after {options.tokens:,}", "change"],
            [
                ["resident memory, MiB", *(f"{b / 2**20:.1f}" for b in row["resident"]), f"{growth:+.2%}"],
                ["cache reports, bytes", *(f"{b:,}" for b in row["reported"]), ""],
                ["tensors held, bytes", *(f"{b:,}" for b in row["held"]), ""],
                ["chunk, ms (median of 100)", *(f"{ms:.2f}" for ms in row["milliseconds"]), f"{slower:+.1%}"],
            ],
        ),
    ]
    rows.write_table("Bounded: a million tokens", lines)
    if growth >= 0.01 or row["reported"] != row["held"]:
        raise SystemExit("not bounded: see the table")


def measure(tokens: int, settled: int, window: int) -> dict[str, Any]:
    """Read the stream, and look at it when it has settled and at its end."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=2, **sizes)).eval()
    found: dict[str, list[float]] = {"resident": [], "reported": [], "held": [], "milliseconds": []}
    times: list[float] = []
    with open_stream(model, LMInfinite(window=window)) as stream:
        for begin in range(0, tokens, CHUNK):
            ids = torch.randint(256, (CHUNK,))
            started = time.perf_counter()
            stream.read(ids)
            times.append(1000 * (time.perf_counter() - started))
            if begin + CHUNK in (settled + 100 * CHUNK, tokens):
                found["milliseconds"].append(median(times[-100:]))
            if begin + CHUNK in (settled, tokens):
                gc.collect()
                found["resident"].append(resident_bytes())
                found["reported"].append(sum(stream.bytes().values()))
                found["held"].append(held_bytes(stream.cache))
    return found


def held_bytes(root: Any) -> int:
    """Add up the storages of all tensors reachable from `root`, the rotary table aside."""
    storages: dict[int, int] = {}
    waiting, known = [root], set()
    while waiting:
        thing = waiting.pop()
        if id(thing) in known:
            continue
        known.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, dict):
            waiting += thing.values()
        elif isinstance(thing, (list, tuple)):
            waiting += thing
        elif type(thing).__module__.startswith("everlong.attention"):
            waiting += vars(thing).values()
    return sum(storages.values())


if __name__ == "__main__":
    main()
