"""A needle in a text that has no end: whether it is found, and what the last tokens take beside the first.

    python benchmarks/needle.py                                  # 100,000 tokens, some ten minutes
    python benchmarks/needle.py --tokens 1000000                 # an hour and a half, 24 GB of disk

A passkey of 7 digits stands in Python's own sources, at some depth. They are read under Recall, in pieces of
512 tokens; what leaves the window goes to a file. At marks on the way are noted: the milliseconds a token
took of the last 20 pieces (their median; the processor's time beside the clock's, as other work may run), the
process's memory, and the bytes held by tier; and, asked of a copy, whether the passkey is found once it was
read. Each text is a row, which is measured in one go. Those of results/needle_before.md were asked in earlier
words, "What is the passkey?", and by earlier code.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from common import RESULTS, Rows, table

from everlong.attention import Recall, Tier
from everlong.evaluation.needles import PASSKEY_QUESTION, Needle, Passkey
from everlong.evaluation.resources import resident_bytes
from everlong.evaluation.streams import PolicyStream, Stream, open_stream
from everlong.evaluation.texts import LIBRARY
from everlong.models.files import human_bytes
from everlong.models.head import Head
from everlong.models.loading import LoadedModel, load_model

PIECE = 512
LATEST = 20
"""Pieces whose median is noted."""

MARKS = (10_000, 50_000, 100_000, 200_000, 300_000, 500_000, 750_000)
"""Tokens after which it is noted what reading takes; and at the end."""


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, nargs="+", default=[100_000])
    parser.add_argument("--depths", type=float, nargs="+", default=[0.1])
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--question", default=PASSKEY_QUESTION)
    parser.add_argument("--layers", type=int, default=3, help="layers that recall the same")
    parser.add_argument("--tier", default="disk", help="ram, disk, or a folder")
    parser.add_argument("--output", type=Path, default=RESULTS / "needle.json")
    options = parser.parse_args()
    setting = {name: getattr(options, name) for name in ("model", "window", "layers", "question")}
    rows = Rows(options.output, setting)
    loaded = load_model(options.model)
    policy, tier = Recall(window=options.window, layers=options.layers), Tier(options.tier, limit=None)
    task = Passkey(LIBRARY, question=options.question)
    for tokens in options.tokens:
        for depth in options.depths:
            rows.get(
                f"{tokens} tokens, depth {depth}, tier {options.tier}",
                lambda n=tokens, d=depth: look_for_one(loaded, policy, tier, task, n, d),
            )
    rows.write_table("A needle in a text without end", page(rows.setting, rows.rows))


@torch.inference_mode()
def look_for_one(
    loaded: LoadedModel, policy: Recall, tier: Tier, task: Passkey, tokens: int, depth: float
) -> dict[str, Any]:
    """Hide a passkey, read, ask; and note on the way what that takes."""
    needle = task.sample(loaded.tokenizer, tokens, depth=depth, seed=0)
    marks = [mark for mark in MARKS if mark < len(needle.context)]
    notes, taken = list[dict[str, Any]](), list[tuple[float, float]]()
    with open_stream(loaded.model, policy, tier=tier) as stream:
        assert isinstance(stream, PolicyStream)
        for piece in torch.split(needle.context, PIECE):
            taken.append(timed(stream, piece))
            if marks and stream.seen >= marks[0]:
                notes.append(noted(stream, taken, marks.pop(0)))
                if stream.seen > (needle.depth + 0.01) * tokens:
                    notes[-1] |= answer(loaded, needle, stream.fork())
        notes.append(noted(stream, taken[:-1] or taken, stream.seen) | answer(loaded, needle, stream))
    return {"depth": needle.depth, "notes": notes}


def answer(loaded: LoadedModel, needle: Needle, stream: Stream) -> dict[str, Any]:
    """Ask a stream for what was hidden, greedily; return what it told, and what a written token took."""
    head, written, steps = Head(loaded.model), list[int](), list[float]()
    hidden = stream.read(needle.question)[-1:]
    for _ in range(needle.tokens_to_write(loaded.tokenizer)):
        written.append(int(head.logits(hidden)[0].argmax()))
        begun = time.process_time()
        hidden = stream.read(torch.tensor(written[-1:]))
        steps.append(time.process_time() - begun)
    told = loaded.tokenizer.decode(written, skip_special_tokens=True)
    return {"is_found": needle.is_told(told), "told": told, "decode_ms": 1000 * mean(steps)}


def timed(stream: Stream, piece: torch.Tensor) -> tuple[float, float]:
    """Read a piece; return seconds a token, by the clock and of the processor."""
    begun = time.perf_counter(), time.process_time()
    stream.read(piece)
    return (time.perf_counter() - begun[0]) / len(piece), (time.process_time() - begun[1]) / len(piece)


def noted(stream: Stream, taken: list[tuple[float, float]], mark: int) -> dict[str, Any]:
    """Return what the latest pieces took, and what is held."""
    clock, processor = (1000 * median(some) for some in zip(*taken[-LATEST:], strict=True))
    return {
        "tokens": mark,
        "ms": clock,
        "processor_ms": processor,
        "resident": resident_bytes(),
        **stream.bytes(),
    }


def page(setting: dict[str, Any], rows: dict[str, Any]) -> list[str]:
    """Return the lines of the page."""
    lines = [
        f"{setting['model']}, `Recall(window={setting['window']}, layers={setting['layers']})`; a passkey of "
        f'7 digits in Python\'s own sources, asked "{Passkey(question=setting["question"]).asked}". '
        f"{torch.get_num_threads()} thread(s). Milliseconds a token while reading: "
        f"medians of the {LATEST} pieces of {PIECE} tokens before; the ratio is of the processor's time, to "
        "that at 50,000 tokens, or where the first note is. Written: the processor's milliseconds for each "
        "token of the answer (mean).",
    ]
    for key, row in rows.items():
        notes, last = row["notes"], row["notes"][-1]
        base = next((note for note in notes if note["tokens"] == 50_000), notes[0])
        found = "found" if last["is_found"] else f"not found: {last['told']!r} was told"
        lines += ["", f"## {key}: {found}", ""]
        lines += table(
            ["tokens read", "ms", "processor ms", "ratio", "process", "window", "RAM", "disk", "found"]
            + ["written"],
            [
                [
                    f"{note['tokens']:,}",
                    f"{note['ms']:.2f}",
                    f"{note['processor_ms']:.2f}",
                    f"{note['processor_ms'] / base['processor_ms']:.2f}",
                    *(human_bytes(note[name]) for name in ("resident", "window", "ram", "disk")),
                    {True: "yes", False: "no", None: "-"}[note.get("is_found")],
                    f"{note['decode_ms']:.0f}" if "decode_ms" in note else "-",
                ]
                for note in notes
            ],
        )
    return lines


if __name__ == "__main__":
    main()
