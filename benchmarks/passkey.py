"""Who finds a passkey in a text longer than the window: methods that recall, methods that forget, and cuts.

    python benchmarks/passkey.py                                     # 8K, 3 texts of each kind
    python benchmarks/passkey.py --text library --window 1024 --lengths 4096 --digits 7 --samples 5
    python benchmarks/passkey.py --text library --lengths 16384 --ways recall lm-infinite \
        --output benchmarks/results/passkey_far.json                 # half an hour
    python benchmarks/passkey.py --text library --lengths 65536 131072 --samples 5 --ways recall \
        --output benchmarks/results/passkey_farther.json             # hours
    python benchmarks/passkey.py --window 1024 --lengths 512 1024 2048 4096 --digits 7 --samples 20 \
        --ways stock lm-infinite recall --output benchmarks/results/passkey_near.json    # also for Gemma

Every method has the same window and reads the same texts: a passkey of 7 or of 64 digits, ever deeper, and
the question only after them. It is hidden among sentences that say nothing, or ("library") in Python's own
sources, which are about something else in every line: that is harder. "stock" is the model as it is, which
sees all there is; "last" and "first-and-last" are the model as it is, the text cut to the window. Found is a
passkey told whole; told is the share of its digits before the first mistake. It can be interrupted and taken
up again after each text. The second of these took 19 minutes with one thread beside other work. The tables
of Python's sources were asked in earlier words: `--question "What is the passkey?"` goes on with them.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from common import RESULTS, Rows, table

from everlong.evaluation.finding import FindingPlan, Found, FoundShare, look, shares
from everlong.evaluation.long_inputs import Way, make_ways
from everlong.evaluation.needles import PASSKEY_QUESTION, Passkey
from everlong.models.files import human_bytes
from everlong.models.loading import load_model

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "stock": ("stock", {}),
    "last": ("last", {}),
    "first-and-last": ("first-and-last", {}),
    "lm-infinite": ("lm-infinite", {}),
    "streaming-llm": ("streaming-llm", {}),
    "lm-infinite, top_k=5": ("lm-infinite", {"top_k": 5}),
    "inf-llm": ("inf-llm", {}),
    "inf-llm, blocks of 32": ("inf-llm", {"block": 32, "sinks": 16}),
    "inf-llm, blocks of 16": ("inf-llm", {"block": 16, "sinks": 16}),
    "re-attention": ("re-attention", {}),
    "recall": ("recall", {}),
    "recall, probes=1": ("recall", {"probes": 1}),
    "recall, steps=1": ("recall", {"steps": 1}),
    "recall, steps=16": ("recall", {"steps": 16}),
    "recall, lead=32": ("recall", {"lead": 32}),
    "recall, momentum=0": ("recall", {"momentum": 0.0}),
    "recall, momentum=0, lead=0": ("recall", {"momentum": 0.0, "lead": 0}),
    "recall, momentum=0, lead=0, distance=256": ("recall", {"momentum": 0.0, "lead": 0, "distance": 256}),
    "recall, momentum=0, lead=0, distance=1359": ("recall", {"momentum": 0.0, "lead": 0, "distance": 1359}),
    "recall, layers=3": ("recall", {"layers": 3}),
    "recall, blocks of 128": ("recall", {"block": 128}),
    "quest": ("quest", {}),
    "quest, pages of 8": ("quest", {"block": 8}),
    "infinite-hip": ("infinite-hip", {}),
    "infinite-hip, block_steps=1": ("infinite-hip", {"block_steps": 1}),
    "h2o": ("h2o", {}),
    "sir-llm": ("sir-llm", {}),
    "infini-pot": ("infini-pot", {}),
    "snap-kv": ("snap-kv", {}),
    "snap-kv, pooled=15": ("snap-kv", {"pooled": 15}),
    "pyramid-kv": ("pyramid-kv", {}),
}
"""How texts are read: a method's name and its options, beside the window, which is a budget for two."""

TEXTS = {"filler": "sentences that say nothing", "library": "Python's own sources"}


def main() -> None:
    """Measure what is missing, and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192])
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--text", choices=("filler", "library"), default="filler")
    parser.add_argument("--digits", type=int, nargs="+", default=[7, 64])
    parser.add_argument("--question", default=PASSKEY_QUESTION)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--output", type=Path, help="default: results/passkey.json, passkey_library.json")
    options = parser.parse_args()
    text = None if options.text == "filler" else options.text
    tasks = tuple(Passkey(text, digits, options.question) for digits in options.digits)
    plan = FindingPlan(tasks, tuple(options.lengths), options.samples)
    setting = {name: getattr(options, name) for name in ("model", "window", "text", "question", "samples")}
    name = "passkey" if options.text == "filler" else f"passkey_{options.text}"
    rows = Rows(options.output or RESULTS / f"{name}.json", setting)
    loaded = load_model(options.model)
    plan.check(loaded.tokenizer)
    ways = {name: made(name, options.window) for name in options.ways}
    kinds = itertools.product(sorted(plan.lengths), tasks, ways.items(), range(plan.samples))
    for length, task, (name, way), sample in kinds:
        rows.get(
            f"{name}; {task.digits} digits in {length}, {sample}",
            lambda w=way, t=task, n=length, s=sample: look(loaded, w, plan, t, n, s).as_json(),
        )
    rows.write_table("Passkeys", page(options, rows.rows))


def made(name: str, window: int) -> Way:
    """Return a way to read."""
    kind, changes = WAYS[name]
    if kind == "stock":
        return make_ways([kind])[0]
    size = "budget" if kind in ("snap-kv", "pyramid-kv") else "window"
    return make_ways([kind], {size: window, **changes})[0]


def page(options: argparse.Namespace, rows: dict[str, Any]) -> list[str]:
    """Return the lines of the page."""
    labels = {Passkey(None, digits, options.question).label: digits for digits in sorted(options.digits)}
    every = shares(sorted(found_in(rows), key=lambda one: (list(labels).index(one.task), one.length)))
    lengths = sorted({share.length for share in every})
    lines = [
        f"{options.model}; a window of {options.window:,} tokens; {TEXTS[options.text]}, "
        f"{options.samples} texts of each kind, in which the passkey stands ever deeper; asked "
        f'"{Passkey(question=options.question).asked}", greedily. Of how many '
        "the passkey was told whole, with intervals of 95 % in percent; in brackets the mean percentage of "
        "digits told before the first mistake. "
        "The question is not known before, except to SnapKV and PyramidKV, which choose once it was read.",
    ]
    for label, digits in labels.items():
        some = {(share.way, share.length): share for share in every if share.task == label}
        named = [way for way in WAYS if any(way == other for other, _ in some)]
        lines += ["", f"## {digits} digits", ""]
        lines += table(
            ["", *(f"{length:,} tokens" for length in lengths)],
            [[way, *(cell(some.get((way, length))) for length in lengths)] for way in named],
        )
    longest = [share for share in every if share.length == lengths[-1] and share.task == every[0].task]
    lines += ["", f"## What {lengths[-1]:,} tokens take", ""]
    lines += table(
        ["", "read", "seen by a token", "forgotten", "window", "tier", "tokens/s", "ms to write a token"],
        [costs(share) for share in longest],
    )
    return lines


def found_in(rows: dict[str, Any]) -> list[Found]:
    """Return what became of each text, of rows as they are kept."""
    return [Found.restored({**row, "way": key.partition(";")[0]}) for key, row in rows.items()]


def cell(share: FoundShare | None) -> str:
    """Return what was found, with its interval."""
    if share is None:
        return ""
    low, high = round(100 * share.found.low), round(100 * share.found.high)
    return f"{counted(share)} ({low} to {high}) [{100 * share.told.mean:.0f}]"


def counted(share: FoundShare) -> str:
    """Say of how many texts all was told."""
    return f"{round(share.found.mean * share.found.samples)} of {share.found.samples}"


def costs(share: FoundShare) -> list[str]:
    """Return what a way to read takes."""
    below = share.bytes.get("ram", 0) + share.bytes.get("disk", 0)
    return [
        share.way,
        *(f"{number:,}" for number in (share.read, share.seen, share.forgotten)),
        human_bytes(share.bytes["window"]),
        human_bytes(below) if below else "",
        f"{share.tokens_per_second:,.0f}",
        f"{share.decode_ms:,.0f}",
    ]


if __name__ == "__main__":
    main()
