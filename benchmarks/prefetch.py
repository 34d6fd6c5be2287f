"""What reading recalled blocks ahead of time could save at most: the share that waiting for the tier takes.

    python benchmarks/prefetch.py        # 16,384 tokens, three tiers, some ten minutes with one thread

Python's own sources are read under Recall in pieces of 512 tokens; then tokens come one by one, as in
writing. Of the latest pieces, and of these tokens, it is noted how long they took by the clock, and how long
of that blocks that had been chosen were read from the tier: no prefetch could save more. The tier is in RAM;
in a file that the system keeps in its page cache; or in one that was dropped from there before each piece and
each token, as one much larger than RAM would be. Each is a row.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import RESULTS, Rows, table

from everlong.attention import Recall, Tier
from everlong.attention.shelves import DiskShelf
from everlong.attention.tiers import BlockStore
from everlong.evaluation.streams import PolicyStream, open_stream
from everlong.evaluation.texts import standard_library
from everlong.models.loading import LoadedModel, load_model

PIECE, LATEST, SINGLE = 512, 10, 32
TIERS = {
    "RAM": ("ram", False),
    "a file in the page cache": ("disk", False),
    "a file out of the page cache": ("disk", True),
}


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--output", type=Path, default=RESULTS / "prefetch.json")
    options = parser.parse_args()
    setting = {name: getattr(options, name) for name in ("model", "tokens", "window")}
    rows = Rows(options.output, setting)
    loaded = load_model(options.model)
    policy = Recall(window=options.window)
    for name, (place, is_dropped) in TIERS.items():
        rows.get(name, lambda p=place, d=is_dropped: measure(loaded, policy, Tier(p), options.tokens, d))
    rows.write_table("What waiting for the tier takes", page(options, rows.rows))


@torch.inference_mode()
def measure(loaded: LoadedModel, policy: Recall, tier: Tier, tokens: int, is_dropped: bool) -> dict[str, Any]:
    """Read, then step; return milliseconds of a piece and of a token, and of each those spent in the tier."""
    text = standard_library(loaded.tokenizer, tokens).ids
    with open_stream(loaded.model, policy, tier=tier) as stream:
        assert isinstance(stream, PolicyStream)
        pieces = torch.split(text[:-SINGLE], PIECE)
        for piece in pieces[:-LATEST]:
            stream.read(piece)

        def timed(some: list[torch.Tensor]) -> tuple[float, float]:
            spent, waited = list[float](), list[float]()
            with waiting(waited.append):
                for piece in some:
                    if is_dropped:
                        drop(stream)
                    began = time.perf_counter()
                    stream.read(piece)
                    spent.append(time.perf_counter() - began)
            return 1000 * mean(spent), 1000 * sum(waited) / len(spent)

        return {
            "piece": timed([*pieces[-LATEST:]]),
            "token": timed([*text[-SINGLE:].split(1)]),
            "tier": stream.bytes(),
        }


@contextmanager
def waiting(note: Callable[[float], None]) -> Iterator[None]:
    """Note the seconds of each reading of chosen blocks within the block."""
    read = BlockStore.read

    def timed(store: BlockStore, begin: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        began = time.perf_counter()
        try:
            return read(store, begin, stop)
        finally:
            note(time.perf_counter() - began)

    BlockStore.read = timed  # type: ignore[method-assign]
    try:
        yield
    finally:
        BlockStore.read = read  # type: ignore[method-assign]


def drop(stream: PolicyStream) -> None:
    """Let the system forget what it holds of the tier's file."""
    stores = [memory.tier for memory in stream.cache.memories.values() if memory.tier is not None]
    for shelf in {id(store._shelf): store._shelf for store in stores}.values():
        assert isinstance(shelf, DiskShelf)
        os.fsync(shelf._file.fileno())
        os.posix_fadvise(shelf._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def page(options: argparse.Namespace, rows: dict[str, Any]) -> list[str]:
    """Return the lines of the page."""
    lines = [
        f"{options.model}, `Recall(window={options.window:,})`, {options.tokens:,} tokens of Python's own "
        f"sources, {torch.get_num_threads()} thread(s); milliseconds by the clock: of the latest {LATEST} "
        f"pieces of {PIECE} tokens, and of {SINGLE} that come one by one, of which each fourth asks (means). "
        "Waiting: reading blocks that were chosen, all that could be done ahead.",
        "",
    ]
    return lines + table(
        ["tier", "a piece", "of it waiting", "share", "a token", "of it waiting", "share"],
        [[name, *cells(row["piece"]), *cells(row["token"])] for name, row in rows.items()],
    )


def cells(found: list[float]) -> list[str]:
    """Return what something took, and what part waiting has in it."""
    whole, waited = found
    return [f"{whole:,.1f}", f"{waited:,.1f}", f"{waited / whole:.1%}"]


if __name__ == "__main__":
    main()
