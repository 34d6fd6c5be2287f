"""What a step of writing takes, by how the weights are packed and how threads wait.

    python benchmarks/writing.py

SmolLM2 writes token after token, head included, in a full window of 1,024 tokens: stock transformers, and
LM-Infinite with float, 8-bit and 4-bit weights, each with threads that sleep at once
(``OMP_WAIT_POLICY=PASSIVE``), that spin briefly before they sleep (as the ``everlong`` command has them) and
that never sleep (``ACTIVE``); each in a process of its own, the median of 5 runs of 20 steps. About 2 minutes
on 2 CPU cores, which must be quiet.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from common import RESULTS, WAITING, Rows, in_own_process, table

from everlong.attention import LMInfinite
from everlong.evaluation.speed import decode_seconds, fill, random_ids
from everlong.evaluation.streams import open_stream
from everlong.models.loading import load_model
from everlong.models.packing import pack

STEPS = 20
WEIGHTS = ("stock", "float", "int8", "int4")


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "writing.json")
    parser.add_argument("--once", metavar="WEIGHTS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(measure(options.model, options.window, options.repeats, options.once)))
        return

    setting = {"model": options.model, "window": options.window, "repeats": options.repeats}
    rows = Rows(options.output, setting)

    def once(weights: str, waiting: str) -> Any:
        arguments = ["--model", options.model, "--window", options.window, "--repeats", options.repeats]
        return in_own_process(__file__, *arguments, "--once", weights, waiting=waiting)

    found = {
        weights: [
            rows.get(f"{weights}, {waiting}", lambda w=weights, p=waiting: once(w, p)) for waiting in WAITING
        ]
        for weights in WEIGHTS
    }
    lines = [
        f"{options.model}, a full window of {options.window:,} tokens; milliseconds a token, the head "
        f"included. Medians of {options.repeats} x {STEPS} steps; threads wait as the column says.",
        "",
        *table(
            ["weights", *WAITING], [[weights, *(f"{ms:.1f}" for ms in row)] for weights, row in found.items()]
        ),
    ]
    rows.write_table("A step of writing", lines)


def measure(model: str, window: int, repeats: int, weights: str) -> float:
    """Milliseconds a step takes in this process."""
    loaded = load_model(model).model
    if weights in ("int8", "int4"):
        pack(loaded, weights)  # type: ignore[arg-type]
    with open_stream(loaded, None if weights == "stock" else LMInfinite(window=window)) as stream:
        fill(stream, window)
        head, ids = loaded.get_output_embeddings(), random_ids(stream.decoder, STEPS)
        decode_seconds(stream, ids, head)  # warms up
        return 1000 * median(median(decode_seconds(stream, ids, head)) for _ in range(repeats))


if __name__ == "__main__":
    main()
