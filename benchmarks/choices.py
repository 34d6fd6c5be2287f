"""What Recall's choices cost while reading a novel: perplexity by position, beside what forgets.

    python benchmarks/choices.py NOVEL.txt        # eight ways, some ten minutes with one thread

Who finds what with the same choices is `passkey.py`'s to tell. A group of queries profits a little from its
later ones, in every row that recalls. It can be interrupted, and taken up again after each way.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import RESULTS, Rows, table

from everlong.attention import LMInfinite, Policy, Recall
from everlong.evaluation.perplexity import bucketed, read_stream
from everlong.evaluation.streams import open_stream
from everlong.evaluation.texts import first_tokens
from everlong.models.head import Head
from everlong.models.loading import load_model

CHANGES: dict[str, dict[str, Any]] = {
    "recall": {},
    "recall, distance=64": {"distance": 64},
    "recall, distance=256": {"distance": 256},
    "recall, distance=L-1": {"distance": -1},
    "recall, lead=0": {"lead": 0},
    "recall, lead=32": {"lead": 32},
    "recall, probes=1": {"probes": 1},
    "recall, layers=3": {"layers": 3},
    "recall, blocks of 128": {"block": 128},
}


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("novel", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=RESULTS / "choices.json")
    options = parser.parse_args()
    loaded = load_model(options.model)
    ids = first_tokens(loaded.tokenizer, options.novel, options.tokens).ids
    setting = {name: getattr(options, name) for name in ("model", "tokens", "window")}
    rows = Rows(options.output, {**setting, "text": options.novel.stem})
    head, width = Head(loaded.model), options.tokens // 4

    def read(policy: Policy | None) -> list[tuple[int, float]]:
        with open_stream(loaded.model, policy) as stream:
            found = bucketed(read_stream(stream, head, ids).surprisal, width)
        return [(bucket.stop, bucket.perplexity) for bucket in found]

    ways: dict[str, Policy | None] = {"stock": None, "lm-infinite": LMInfinite(window=options.window)}
    ways |= {name: changed(options.window, dict(changes)) for name, changes in CHANGES.items()}
    found = {name: rows.get(name, lambda p=policy: read(p)) for name, policy in ways.items()}
    lines = [
        f"{options.model} on {options.novel.stem}, {len(ids):,} tokens in pieces of 512, a window of "
        f"{options.window:,}. Perplexity of each quarter (column: its last position). L - 1 is where the "
        "oldest of the latest tokens stand.",
        "",
        *table(
            ["", *(f"{stop:,}" for stop, _ in found["stock"])],
            [
                [name, *(f"{perplexity:.2f}" for _, perplexity in quarters)]
                for name, quarters in found.items()
            ],
        ),
    ]
    rows.write_table("What Recall's choices cost", lines)


def changed(window: int, changes: dict[str, Any]) -> Policy:
    """Return Recall with some choices of its own; a distance of -1 is the farthest."""
    if changes.get("distance") == -1:
        changes["distance"] = Recall(window=window).resolve(None).shape()[2] - 1
    return replace(Recall(window=window), **changes)


if __name__ == "__main__":
    main()
