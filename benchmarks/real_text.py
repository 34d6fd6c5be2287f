"""Perplexity by position on a novel, and LM-Infinite against a model that re-reads its window from scratch.

    python benchmarks/real_text.py NOVEL.txt

Reads 32,768 tokens under each method and window, then, at anchors beyond the training length, scores the
next 64 tokens with the stock model that has just read the last tokens and nothing else: the honest upper
reference of a window. A reference token sees between window - 64 and window - 1 tokens, never more than
LM-Infinite's. About 100 minutes on 2 CPU cores (the stock model and the ceiling without a Λ mask, which
keep everything, take half of it); every row is kept, so it can be interrupted. `--only stock` and the like
choose rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Rows, table

from everlong.attention import FullAttention, LMInfinite, Policy, StreamingLLM
from everlong.evaluation.perplexity import bucketed, read_stream
from everlong.evaluation.statistics import Interval, mean_interval
from everlong.evaluation.streams import StockStream, open_stream
from everlong.evaluation.texts import first_tokens
from everlong.models.head import Head
from everlong.models.loading import load_model

SCORED = 64  # tokens after each anchor


def methods(window: int) -> dict[str, Policy]:
    """Return the methods compared at one window, the paper's ablations included."""
    sinks = LMInfinite().sinks
    return {
        "LM-Infinite": LMInfinite(window=window),
        "LM-Infinite, authors' ceiling": LMInfinite(window=window, ceiling=window - sinks),
        "StreamingLLM": StreamingLLM(window=window),
        "window without sinks": LMInfinite(window=window, sinks=0),
        "Λ mask without ceiling": LMInfinite(window=window, ceiling=None),
        "ceiling without Λ mask": FullAttention(ceiling=window - 1),
    }


def main() -> None:
    """Measure what is missing, and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("novel", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--windows", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--bucket", type=int, default=2048)
    parser.add_argument("--anchors", type=int, default=48)
    parser.add_argument("--after", type=int, help="first anchor (default: the training length)")
    parser.add_argument("--only", nargs="+", help="measure only rows whose name contains one of these")
    parser.add_argument("--output", type=Path, default=RESULTS / "real_text.json")
    options = parser.parse_args()

    loaded = load_model(options.model)
    model, head = loaded.model, Head(loaded.model)
    ids = first_tokens(loaded.tokenizer, options.novel, options.tokens).ids
    after = options.after or int(model.config.max_position_embeddings)
    step = (len(ids) - SCORED - after) / max(1, options.anchors - 1)
    anchors = [after + round(step * number) for number in range(options.anchors)]
    setting = {
        "model": loaded.name,
        "text": options.novel.stem,
        "tokens": len(ids),
        "bucket": options.bucket,
        "anchors": anchors,
    }
    rows = Rows(options.output, setting)

    def at_anchors(surprisal: torch.Tensor) -> list[float]:
        return [float(surprisal[at : at + SCORED].double().mean()) for at in anchors]

    def read(policy: Policy | None) -> dict[str, Any]:
        with open_stream(model, policy) as stream:
            reading = read_stream(stream, head, ids)
        buckets = [[b.stop, b.perplexity, b.low, b.high] for b in bucketed(reading.surprisal, options.bucket)]
        return {"buckets": buckets, "anchors": at_anchors(reading.surprisal), "seconds": reading.seconds}

    def reread(window: int) -> dict[str, Any]:
        means = []
        for at in anchors:
            piece = ids[at - (window - SCORED) : at + SCORED]
            surprisal = read_stream(StockStream(model), head, piece).surprisal[-SCORED:]
            means.append(float(surprisal.double().mean()))
        return {"anchors": means}

    wanted = [("stock", None, 0)]
    wanted += [(f"{name}, {w}", p, w) for w in options.windows for name, p in methods(w).items()]
    for key, policy, _ in sorted(wanted, key=lambda row: "ceiling without" in row[0]):
        if not options.only or any(part in key for part in options.only):
            rows.get(key, lambda policy=policy: read(policy))
    for window in options.windows:
        key = f"re-reading, {window}"
        if not options.only or any(part in key for part in options.only):
            rows.get(key, lambda window=window: reread(window))

    measured = [key for key, _, _ in wanted if key in rows.rows]
    if not measured:
        return  # only the references so far: there is no table yet
    first = rows.rows[measured[0]]["buckets"]
    lines = [
        f"{loaded.name} on {options.novel.stem}, {len(ids):,} tokens in chunks of 512. Perplexity of each "
        f"{options.bucket:,} tokens (column: the last position of the bucket).",
        "",
        *table(
            ["method, window", *(f"{stop:,}" for stop, *_ in first)],
            [[key, *(number(ppl) for _, ppl, *_ in rows.rows[key]["buckets"])] for key in measured],
        ),
        "",
        f"Surprisal of the {SCORED} tokens after each of {len(anchors)} anchors from {anchors[0]:,} to "
        f"{anchors[-1]:,}, in nats per token, and the excess over the stock model that re-read its last "
        "`window` tokens from scratch (paired, 95 % interval over anchors).",
        "",
        *table(
            ["method, window", "surprisal", "re-reading", "excess", "interval"], excess(rows.rows, wanted)
        ),
    ]
    rows.write_table("Real text: perplexity by position", lines)


def excess(rows: dict[str, Any], wanted: list[tuple[str, Policy | None, int]]) -> list[list[str]]:
    """Compare each measured method with re-reading at its window."""
    found = []
    for key, _, window in wanted:
        if key not in rows or f"re-reading, {window}" not in rows:
            continue
        paired = excess_of(rows, key, window)
        means = [mean_interval(rows[name]["anchors"]).mean for name in (key, f"re-reading, {window}")]
        interval = f"{paired.low:+.4f} to {paired.high:+.4f}"
        found.append([key, *(f"{mean:.4f}" for mean in means), f"{paired.mean:+.4f}", interval])
    return found


def excess_of(rows: dict[str, Any], key: str, window: int) -> Interval:
    """Return how much more surprised a method is than the model that re-reads, paired by anchor."""
    ours, theirs = rows[key]["anchors"], rows[f"re-reading, {window}"]["anchors"]
    return mean_interval([a - b for a, b in zip(ours, theirs, strict=True)])


def number(perplexity: float) -> str:
    """Format a perplexity, large ones shortly."""
    return f"{perplexity:.1f}" if perplexity < 1000 else f"{perplexity:,.0f}"


if __name__ == "__main__":
    main()
