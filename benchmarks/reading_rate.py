"""How fast methods that recall read on, beside LM-Infinite, which forgets: by how much was read before.

    python benchmarks/reading_rate.py        # to 32,768 tokens, some fifteen minutes with one thread

Python's own sources are read in pieces of 512 tokens, in a window of 2,048. At each length the rate is the
median of the latest pieces, by the processor's time: other work counts for less. Then 32 tokens more are read
one by one, as in writing. Each method is a row.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import RESULTS, Rows, table

from everlong.evaluation.long_inputs import Way, make_ways
from everlong.evaluation.streams import open_stream
from everlong.evaluation.texts import standard_library
from everlong.models.files import human_bytes
from everlong.models.loading import LoadedModel, load_model

PIECE = 512
LATEST = 10
"""Pieces whose median counts."""

SINGLE = 32
"""Tokens that come one by one, after those."""

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "lm-infinite": ("lm-infinite", {}),
    "recall": ("recall", {}),
    "recall, layers=3": ("recall", {"layers": 3}),
    "inf-llm, blocks of 32": ("inf-llm", {"block": 32, "sinks": 16}),
}


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--output", type=Path, default=RESULTS / "reading_rate.json")
    options = parser.parse_args()
    setting = {name: getattr(options, name) for name in ("model", "lengths", "window")}
    rows = Rows(options.output, setting)
    loaded = load_model(options.model)
    for name in options.ways:
        kind, changes = WAYS[name]
        way = make_ways([kind], {"window": options.window, **changes})[0]
        rows.get(name, lambda w=way: read(loaded, w, sorted(options.lengths)))
    rows.write_table("Reading on, and recalling", page(options, rows.rows))


@torch.inference_mode()
def read(loaded: LoadedModel, way: Way, lengths: list[int]) -> dict[str, Any]:
    """Read to the longest of `lengths`; return tokens a second at each, and what is held at the end."""
    ids = torch.as_tensor(standard_library(loaded.tokenizer, lengths[-1] + SINGLE).ids)
    rates, taken = list[float](), list[float]()
    with open_stream(loaded.model, way.policy) as stream:
        for piece in torch.split(ids[: lengths[-1]], PIECE):
            begun = time.process_time()
            stream.read(piece)
            taken.append((time.process_time() - begun) / len(piece))
            if stream.seen >= lengths[len(rates)]:
                rates.append(1 / median(taken[-LATEST:]))
        held, begun = stream.bytes(), time.process_time()
        for token in torch.split(ids[lengths[-1] :], 1):
            stream.read(token)
        return {"rates": rates, "bytes": held, "single_ms": 1000 * (time.process_time() - begun) / SINGLE}


def page(options: argparse.Namespace, rows: dict[str, Any]) -> list[str]:
    """Return the lines of the page."""
    base = next(iter(rows.values()))["rates"]
    lines = [
        f"{options.model}, a window of {options.window:,} tokens, Python's own sources. "
        f"{torch.get_num_threads()} thread(s). Tokens a second of the processor's time, medians of the "
        f"latest {LATEST} pieces of {PIECE} tokens; in brackets the share of the first row's. One by one: "
        f"milliseconds for each of {SINGLE} tokens more, with float weights (mean).",
        "",
    ]
    at = [f"at {length:,}" for length in sorted(options.lengths)]
    return lines + table(
        ["", *at, "one by one", "window", "tier and its keys"],
        [
            [
                name,
                *(f"{rate:.0f} ({rate / of:.0%})" for rate, of in zip(row["rates"], base, strict=True)),
                f"{row['single_ms']:.0f}",
                human_bytes(row["bytes"]["window"]),
                human_bytes(row["bytes"]["ram"]) if row["bytes"].get("ram") else "",
            ]
            for name, row in rows.items()
        ],
    )


if __name__ == "__main__":
    main()
