"""What a session still knows of facts that left its window long ago, learned in passing or not.

    python benchmarks/memory_passing.py                    # about 25 minutes with one thread

A stream of several windows: documents of 30 invented facts, then a real text. It is read under a window that
forgets, without and with `memorize=`, and under one that holds all of it; at the end of each, the session is
asked for the facts, as completions, as differently worded questions, and in reverse. Learning is what takes
the time: what leaves the window is learned until `--learned` tokens of the real text were read, so that the
documents and some of that text after them are; the rest is only read. It can be interrupted and taken up
again, row by row.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, Rows, table
from memories import mean, share
from memory_facts import FORMS

import everlong
from everlong import LLM, LMInfinite, MemoryStore, Session
from everlong.evaluation.facts import fact_documents
from everlong.evaluation.probes import Probe, is_answer
from everlong.evaluation.texts import standard_library
from everlong.memory.passing import Learning
from everlong.memory.recipes import Recipe, make_recipe

_TOGETHER = 16  # probes asked at a time


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=3072, help="of the real text")
    parser.add_argument("--learned", type=int, default=768, help="of those, read with memorize=")
    parser.add_argument("--segment-tokens", type=int, default=256)
    parser.add_argument("--continuations", type=int, default=make_recipe().continuations, help="of a pass")
    parser.add_argument("--force", action="store_true", help="learn whatever the text is worth")
    parser.add_argument("--output", type=Path, default=RESULTS / "memory_passing.json")
    options = parser.parse_args()
    setting = {key: value for key, value in vars(options).items() if key != "output"}
    setting["recipe"] = recipe_of(options).values()
    rows = Rows(options.output, setting)
    with everlong.load(options.model, LMInfinite(window=options.window)) as llm:
        stream = Stream(llm, options)
        rows.get("no context", stream.nothing)
        rows.get("window alone", stream.window)
        rows.get("all in the window", stream.everything)
        rows.get("window + memory", stream.window_and_memory)
    rows.write_table("Memory in passing", page(options, rows.rows))


def recipe_of(options: argparse.Namespace) -> Recipe:
    """Return how what leaves the window is learned."""
    return make_recipe(segment_tokens=options.segment_tokens, continuations=options.continuations)


class Stream:
    """The text, and the ways to read it."""

    def __init__(self, llm: LLM, options: Any) -> None:
        self._llm = llm
        self._options = options
        documents = fact_documents(0, options.documents)
        self._probes = [probe for document in documents for probe in document.probes()]
        self._facts = "".join(f"{document.text}\n\n" for document in documents)
        ids = standard_library(llm.tokenizer, options.tokens).ids
        self._after = [
            llm.tokenizer.decode(part, skip_special_tokens=True)
            for part in (ids[: options.learned], ids[options.learned :])
        ]

    def nothing(self) -> dict[str, Any]:
        """Ask a session that read nothing."""
        return {"recall": ask(self._llm, self._llm.session(), self._probes)}

    def window(self) -> dict[str, Any]:
        """Read all, and ask."""
        return self._asked_after(self._llm.session())

    def everything(self) -> dict[str, Any]:
        """Read all under a window that holds it, and ask."""
        return self._asked_after(self._llm.session("full"))

    def window_and_memory(self) -> dict[str, Any]:
        """Read all, learning in passing, and ask; and ask another session with that memory alone."""
        options = self._options
        learning = Learning("facts", recipe_of(options), force=options.force)
        with tempfile.TemporaryDirectory() as folder:
            store = MemoryStore(folder)
            session = self._llm.session(store=store)
            started = time.perf_counter()
            report = session.read(self._facts + self._after[0], memorize=learning)
            seconds = time.perf_counter() - started
            assert report.learned is not None
            found: dict[str, Any] = {
                "learning": {
                    "tokens": report.learned.tokens,
                    "segments": report.learned.segments,
                    "read": report.tokens,
                    "seconds": seconds,
                }
            }
            alone = self._llm.session(memories=["facts"], store=store)
            found["memory alone"] = ask(self._llm, alone, self._probes)
            return {**found, **self._asked_after(session, self._after[1:])}

    def _asked_after(self, session: Session, texts: Sequence[str] | None = None) -> dict[str, Any]:
        reports = [session.read(text) for text in (texts or [self._facts, *self._after])]
        seconds, tokens = (sum(getattr(each, of) for each in reports) for of in ("seconds", "tokens"))
        return {
            "recall": ask(self._llm, session, self._probes),
            "seconds per 1000": 1000 * seconds / tokens,
            "read": session.stats.tokens_read,
            "kept": session.stats.kept,
        }


def ask(llm: LLM, session: Session, probes: Sequence[Probe]) -> dict[str, list[int]]:
    """Return right answers and probes, by form: each is asked on a fork."""
    found = {form: [0, 0] for form in FORMS}
    for start in range(0, len(probes), _TOGETHER):
        some = probes[start : start + _TOGETHER]
        forks = [session.fork() for _ in some]
        for fork, probe in zip(forks, some, strict=True):
            fork.read(f"\n\n{probe.prompt}" if session.stats.tokens_read else probe.prompt)
        for probe, written in zip(some, llm.generate_together(forks, 12, stop="\n"), strict=True):
            found[probe.form][0] += is_answer(written.text, probe)
            found[probe.form][1] += 1
    return found


def page(options: Any, rows: dict[str, Any]) -> list[str]:
    """Return the lines of the page."""
    passing, learning = rows["window + memory"], rows["window + memory"]["learning"]
    asked = {
        "nothing": rows["no context"],
        f"the window of {options.window} tokens": rows["window alone"],
        "that window, and the memory learned in passing": passing,
        "that memory alone": {"recall": passing["memory alone"]},
        "a window that holds everything": rows["all in the window"],
    }
    cells = []
    for name, row in asked.items():
        recall = row["recall"]
        speed = f"{row['seconds per 1000']:.1f}" if "seconds per 1000" in row else ""
        kept = f"{row['kept']:,}" if "kept" in row else ""
        by_form = {form: [recall[form]] for form in FORMS}
        cells.append([name, *map(share, by_form.values()), f"{100 * mean(by_form):.0f}", kept, speed])
    return [
        f"{options.model}; {rows['window alone']['read']:,} tokens are read: {options.documents} documents "
        f"of 30 facts, then {options.tokens:,} tokens of Python's own sources; greedy; an answer is right if "
        "its first words are; no examples are shown. Percent, with intervals of 95 %.",
        "",
        *table(["what the model has", *FORMS, "mean", "tokens held", "s per 1000 tokens, read only"], cells),
        "",
        f"Learned in passing: {learning['tokens']:,} tokens in {learning['segments']} segments, while "
        f"{learning['read']:,} were read, with {options.continuations} continuations a pass, in "
        f"{learning['seconds']:,.0f} s: "
        f"{1000 * learning['seconds'] / learning['tokens']:,.0f} s per 1000 tokens learned.",
    ]


if __name__ == "__main__":
    main()
