"""What packed weights cost in perplexity: the same tokens scored with float, 8-bit and 4-bit weights.

    python benchmarks/weights.py NOVEL.txt

Tokens are read 32 at a time, few enough for the packed weights to be used in every product, head included;
the float run reads them alike. The difference is paired over blocks of 32 tokens. About 5 minutes on 2 CPU
cores; every row is kept, so it can be interrupted.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, Literal

import torch
from common import RESULTS, Rows, table

from everlong.attention import LMInfinite, attach
from everlong.evaluation.statistics import BLOCK, mean_interval
from everlong.evaluation.texts import first_tokens
from everlong.models.loading import load_model
from everlong.models.packing import MOST_ROWS, bytes_of, pack
from everlong.reading.driver import Driver

CHUNK = 32
KINDS: tuple[Literal["int8", "int4"], ...] = ("int8", "int4")


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("novel", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--output", type=Path, default=RESULTS / "weights.json")
    options = parser.parse_args()
    assert CHUNK <= MOST_ROWS

    loaded = load_model(options.model)
    model = loaded.model
    ids = first_tokens(loaded.tokenizer, options.novel, options.tokens).ids
    setting = {
        "model": loaded.name,
        "text": options.novel.stem,
        "tokens": len(ids),
        "window": options.window,
    }
    rows = Rows(options.output, setting)

    def scored(kind: Literal["int8", "int4"] | None) -> dict[str, Any]:
        packing = None if kind is None else pack(model, kind)
        parts = []
        with attach(model, LMInfinite(window=options.window)) as handle:
            driver = Driver(handle, handle.new_cache(), surprisal=True)
            for piece in ids.split(CHUNK):
                part = driver.run(piece.tolist(), logits=True)
                assert part is not None
                parts.append(part)
        if packing is not None:
            packing.undo()
        blocks = torch.cat(parts)[1:].double().split(BLOCK)
        return {
            "blocks": [float(block.mean()) for block in blocks if len(block) == BLOCK],
            "bytes": bytes_of(model, kind) if kind else sum(p.nbytes for p in model.parameters()),
        }

    found = {kind or "float": rows.get(kind or "float", lambda k=kind: scored(k)) for kind in (None, *KINDS)}
    base = found["float"]["blocks"]
    lines = [
        f"{loaded.name} on {options.novel.stem}, {len(ids):,} tokens, {CHUNK} at a time, LM-Infinite with a "
        f"window of {options.window:,}.",
        "Change: of the perplexity against float weights, with its 95 % interval (paired, "
        f"{len(base)} blocks of {BLOCK} tokens).",
        "",
        *table(
            ["weights", "perplexity", "change", "interval", "MB, besides the float ones"],
            [[kind, *cells(row, base, kind)] for kind, row in found.items()],
        ),
    ]
    rows.write_table("Packed weights: perplexity", lines)


def cells(row: dict[str, Any], base: list[float], kind: str) -> list[str]:
    """One row of the table."""
    paired = mean_interval([ours - theirs for ours, theirs in zip(row["blocks"], base, strict=True)])
    change, low, high = (f"{math.expm1(nats):+.2%}" for nats in (paired.mean, paired.low, paired.high))
    perplexity = f"{math.exp(mean_interval(row['blocks']).mean):.3f}"
    if kind == "float":
        return [perplexity, "", "", ""]
    return [perplexity, change, f"{low} to {high}", f"{row['bytes'] / 1e6:.0f}"]


if __name__ == "__main__":
    main()
