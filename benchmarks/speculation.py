"""What guessing ahead saves: prompt lookup and lookahead decoding on prose, code and a summary.

    python benchmarks/speculation.py NOVEL

SmolLM2 in a window of 1,024 tokens reads the beginning of a novel (a text file), or of Python's own sources,
and goes on for 128 tokens, or summarises the novel's first pages; greedily, one token at a time and with each
way to speculate, with float weights and with packed ones, threads that spin briefly (as the ``everlong``
command has them), in turn, median of 3. About 5 minutes on 2 CPU cores, which must be quiet.

Where a text differs from what was written one token at a time, the page says by how much the likelier of the
two tokens at which they part was ahead: packed weights round differently with the number of rows.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from common import RESULTS, Rows, in_own_process, table

from everlong.attention import LMInfinite
from everlong.evaluation.texts import standard_library
from everlong.llm import LLM, load
from everlong.reading import Session

WINDOW, TOKENS, REPEATS = 1024, 128, 3
START, LONG, SHORT = 2000, 12000, 3500  # characters of the novel: where it is begun, and how much is read
TEXTS = ("prose", "code", "summary")
WAYS = ("none", "prompt-lookup", "lookahead")
WEIGHTS = ("int4", "float")


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("book", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--output", type=Path, default=RESULTS / "speculation.json")
    parser.add_argument("--once", nargs=2, metavar=("TEXT", "WEIGHTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(measure(options, *options.once)))
        return

    setting = {
        "model": options.model,
        "book": options.book.stem,
        "tokens": options.tokens,
        "repeats": options.repeats,
    }
    rows = Rows(options.output, setting)

    def once(text: str, weights: str) -> Any:
        words = ["--model", options.model, "--tokens", options.tokens, "--repeats", options.repeats]
        return in_own_process(__file__, options.book, *words, "--once", text, weights, waiting="spin briefly")

    found = {
        (text, weights): rows.get(f"{text}, {weights}", lambda t=text, w=weights: once(t, w))
        for weights in WEIGHTS
        for text in TEXTS
    }
    rows.write_table("Guessing ahead", page(setting, found))


def measure(options: Any, text: str, weights: str) -> dict[str, Any]:
    """Write each way in this process: its tokens, forwards and seconds, and where it parts from the first."""
    with load(options.model, LMInfinite(window=WINDOW), weights=cast(Any, weights)) as llm:
        session = begun(llm, text, options.book)
        forwards: list[int] = []
        llm.handle.decoder.register_forward_hook(lambda *_: forwards.append(1))
        written: dict[str, list[int]] = {}
        counted: dict[str, int] = {}
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(options.repeats + 1):  # the first packs the weights, and warms up
            for way in WAYS:
                fork = session.fork()
                forwards.clear()
                started = time.perf_counter()
                fork.generate(options.tokens, speculate=None if way == "none" else way)
                seconds[way].append(time.perf_counter() - started)
                counted[way], written[way] = len(forwards), tokens_of(fork)[-options.tokens :]
        return {
            way: {
                "tokens": len(written[way]),
                "forwards": counted[way],
                "seconds": median(seconds[way][1:]),
                "margin": margin(session, written["none"], written[way]),
            }
            for way in WAYS
        }


def begun(llm: LLM, text: str, book: Path) -> Session:
    """Return a session that has read one of the texts and is to go on."""
    session = llm.session()
    if text == "code":
        session.read(standard_library(llm.tokenizer, 4000).ids)
    elif text == "prose":
        beginning = book.read_text(encoding="utf-8")[START : START + LONG]
        session.read(torch.tensor(llm.tokenizer.encode(beginning)))
    else:
        session.read(book.read_text(encoding="utf-8")[START : START + SHORT])
        session.to_answer("Summarise the text above in a few sentences.", keep=True)
    llm.model.generation_config.eos_token_id = None
    session.model.__dict__["end_tokens"] = frozenset()  # each writes as many tokens
    return session


def tokens_of(session: Session) -> list[int]:
    """Return the latest tokens of a session's stream, the one that waits included."""
    tape = session.to_go_on()
    return [*tape.driver.recent, *tape.queue]


def margin(session: Session, plain: list[int], other: list[int]) -> float | None:
    """By how much the plain text's logit was ahead where another text parts from it; None: nowhere."""
    at = next((at for at, (one, two) in enumerate(zip(plain, other, strict=False)) if one != two), None)
    if at is None:
        return None
    tape = session.fork().to_go_on()
    tape.run_all(512, logits=True)
    for token in plain[:at]:
        tape.driver.run([token], logits=True)
    logits = tape.driver.logits
    assert logits is not None
    return float(logits[plain[at]] - logits[other[at]])


def page(setting: dict[str, Any], found: dict[tuple[str, str], Any]) -> list[str]:
    """Lay the table out."""
    lines = []
    for (text, weights), ways in found.items():
        plain = ways["none"]
        for way in WAYS[1:]:
            each = ways[way]
            parted = each["margin"]
            lines.append(
                [
                    f"{text}, {weights}",
                    way,
                    f"{each['tokens'] / each['forwards']:.2f}",
                    f"{plain['tokens'] / plain['seconds']:.1f}",
                    f"{each['tokens'] / each['seconds']:.1f}",
                    f"{plain['seconds'] / each['seconds']:.2f}",
                    "the same" if parted is None else f"parts, {parted:.3f} ahead",
                ]
            )
    return [
        f"{setting['model']}, LMInfinite(window={WINDOW}), {setting['tokens']} tokens written greedily "
        f"after *{setting['book']}*, Python's own sources, or the request to summarise the novel's first "
        "pages; threads that spin briefly, whatever the line above says. Medians of "
        f"{setting['repeats']}, in turn; a ratio above 1 is in favour of guessing.",
        "",
        *table(
            ["text, weights", "way", "tokens a forward", "tokens/s: one by one", "guessing", "ratio", "text"],
            lines,
        ),
    ]


if __name__ == "__main__":
    main()
