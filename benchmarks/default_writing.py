"""What a token takes as ``load()`` writes it, by how many there are, with compiled kernels and without.

    python benchmarks/default_writing.py

The default policy and weights, the head included, threads as the ``everlong`` command sets them, beside
stock transformers with float weights at the same length: up to the model's training length before anything
has left the window, and beyond it, where the policy recalls. Each in a process of its own; of 100 tokens,
after 40 that warm up, the time of one is the median of means of 32, so that what is looked up now and then
counts. About 15 minutes on 2 CPU cores, which must be quiet: most of it reads random tokens.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from common import RESULTS, Rows, in_own_process, table

from everlong.attention import Recall
from everlong.evaluation.speed import BLOCK, decode_seconds, fill, random_ids, step_seconds
from everlong.evaluation.streams import open_stream
from everlong.kernels.loading import SWITCH
from everlong.models.loading import load_model
from everlong.models.packing import choose_weights, pack

DEPTHS = (256, 1024, 4096, 12288)
WARM_UP, TOKENS = 40, 100
WAYS = {"stock": "stock transformers", "0": "without compiled kernels", "1": "with them"}


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--depths", nargs="+", type=int, default=DEPTHS)
    parser.add_argument("--output", type=Path, default=RESULTS / "default_writing.json")
    parser.add_argument("--once", nargs=2, metavar=("WAY", "DEPTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(measure(options.model, options.once[0] == "stock", int(options.once[1]))))
        return
    rows = Rows(options.output, {"model": options.model, "tokens": TOKENS})

    def once(way: str, depth: int) -> Any:
        if way != "stock":
            os.environ[SWITCH] = way
        return in_own_process(
            __file__, "--model", options.model, "--once", way, depth, waiting="spin briefly"
        )

    def of(depth: int, way: str) -> Any:
        return rows.get(f"{depth:,} tokens, {WAYS[way]}", lambda: once(way, depth))

    found = {depth: {way: of(depth, way) for way in WAYS} for depth in options.depths}
    policy, weights = found[options.depths[0]]["1"]["as"]
    lines = [
        f"{options.model}; {policy}, weights {weights}; stock with float weights. Milliseconds a token, the "
        f"head included; of {TOKENS} tokens the median of means of {BLOCK}.",
        "",
        *table(
            ["tokens before", *WAYS.values(), "stock / with them"],
            [
                [f"{depth:,}", *(f"{row[way]['ms']:.1f}" for way in WAYS), times(row)]
                for depth, row in found.items()
            ],
        ),
    ]
    rows.write_table("A written token, by default", lines)


def times(row: dict[str, Any]) -> str:
    """Say how many times faster than stock the default is."""
    return f"{row['stock']['ms'] / row['1']['ms']:.1f}x"


def measure(model: str, is_stock: bool, depth: int) -> dict[str, Any]:
    """Milliseconds a token takes in this process, and what it was written with."""
    loaded, weights, policy = load_model(model).model, "float", None
    if not is_stock:
        policy, weights = Recall(), choose_weights(loaded, "auto")
        if weights != "float":
            pack(loaded, weights)
    with open_stream(loaded, policy) as stream:
        fill(stream, depth)
        head, ids = loaded.get_output_embeddings(), random_ids(stream.decoder, WARM_UP + TOKENS)
        steps = decode_seconds(stream, ids, head)[WARM_UP:]
    return {"ms": 1000 * step_seconds(steps), "as": [type(policy).__name__, weights]}


if __name__ == "__main__":
    main()
