"""What a memory recalls of invented facts, beside the text itself, a part of it, and other training.

    python benchmarks/memory_facts.py                                 # 3 documents
    python benchmarks/memory_facts.py --documents 20 --seeds 3        # the whole: some hours

Documents of 30 facts about people who exist nowhere else, each asked for as a completion, as a differently
worded question, and in reverse. Every document is learned in several ways, all else equal: by InfiniteICL
with the teacher's distributions (soft labels) and with the responses as they stand (hard labels), also
without what the base model writes having read the text (continuations); from 300 tokens of responses, chosen
by gain and at random; and by next-token training on the text, for as many passes and for as many steps. Then
the probes are asked with an empty context; and with the whole text, its last tenth, and the tenth of it that
a lexical search finds for each probe, with and without the memory; and with the memory of another document.
Examples stand before questions where the text does: two kinds, of the questions' own form, and of another.
Intervals are of 95 % over the probes of all documents. With several seeds, documents take them in turn: the
first is learned with 0, the next with 1. It can be interrupted and taken up again; with one thread, some 7
minutes a document and way.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from common import RESULTS, Rows
from memories import (
    AS_MANY_STEPS,
    RAW_TEXT,
    SHARE,
    cost_table,
    counts,
    gate,
    gate_line,
    learned,
    recall_table,
)

from everlong.evaluation.facts import EXAMPLES_ELSEWHERE, FactDocument, fact_documents, matching_examples
from everlong.evaluation.forgetting import wrong_documents
from everlong.evaluation.recall import context_tail, recall, retrieved_context
from everlong.memory.lexical import LexicalIndex
from everlong.memory.recipes import make_recipe
from everlong.models.loading import LoadedModel, load_model

FORMS = ("completion", "question", "reverse")
WAYS: dict[str, dict[str, Any]] = {
    "hard labels": {"targets": "hard"},
    "hard labels, no continuations": {"targets": "hard", "continuations": 0},
    "soft labels": {"targets": "soft"},
    "300 tokens, by gain": {"targets": "soft", "budget": 300},
    "300 tokens, at random": {"targets": "soft", "budget": 300, "selection": "random"},
    "raw text": RAW_TEXT,
    "raw text, as many steps": {**RAW_TEXT, "passes": AS_MANY_STEPS},
}
"""How a document is learned: changes to the recipe "infinite-icl"."""
CONTROLLED = ("hard labels", "hard labels, no continuations")
"""Which of them is asked with a part of the text too, and about another document."""

GATED = 3  # documents of which the gate is asked


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--documents", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--output", type=Path, default=RESULTS / "memory_facts.json")
    options = parser.parse_args()
    rows = Rows(options.output, {"model": options.model, "recipe": make_recipe().values()})
    loaded = load_model(options.model)
    every = fact_documents(0, 20)
    documents = every[: options.documents]
    wrong = wrong_documents(20, 0)
    for way, (number, document) in itertools.product(options.ways, enumerate(documents)):
        rows.get(f"read {number}", lambda d=document: reading(loaded, d))
        if number < GATED:
            rows.get(f"gate {number}", lambda d=document: gate(loaded, d.text))
        seed = number % options.seeds
        rows.get(
            f"learned {number}, seed {seed}, {way}",
            lambda d=document, o=every[wrong[number]], s=seed, w=way: learning(loaded, d, o, s, w),
        )
    rows.write_table("Memories of invented facts", page(options, rows.rows))


def reading(loaded: LoadedModel, document: FactDocument) -> dict[str, Any]:
    """Ask with nothing learned."""
    probes, text = document.probes(), document.text
    parts = [retrieved(document, probe.prompt) for probe in probes]
    found = {"no context": score(loaded, document)}
    for name, context in {
        "whole text": text,
        "last 10 %": context_tail(text, SHARE),
        "10 % by lexical search": parts,
    }.items():
        found[f"{name}, no examples"] = score(loaded, document, context)
        found[f"{name}, other examples"] = score(loaded, document, context, EXAMPLES_ELSEWHERE)
        found[f"{name}, matching examples"] = score(loaded, document, context, matching_examples(0))
    return found


def learning(
    loaded: LoadedModel, document: FactDocument, other: FactDocument, seed: int, way: str
) -> dict[str, Any]:
    """Learn a document, and ask."""
    with learned(loaded, document.text, seed, **WAYS[way]) as (known, cost):
        found: dict[str, Any] = {way: score(known, document)}
        if way in CONTROLLED:
            parts = [retrieved(document, probe.prompt) for probe in document.probes()]
            found[f"{way} + last 10 %"] = score(known, document, context_tail(document.text, SHARE))
            found[f"{way} + 10 % by lexical search"] = score(known, document, parts)
            found[f"{way} of another document"] = score(known, other)
        return found | cost


def retrieved(document: FactDocument, prompt: str) -> str:
    """Return the tenth of a document that a lexical search finds."""
    return retrieved_context(LexicalIndex(document.sentences), document.sentences, prompt, SHARE)


def score(
    loaded: LoadedModel, document: FactDocument, context: Any = "", examples: str = ""
) -> dict[str, list[int]]:
    """Return right answers and probes, by form."""
    asked = document.probes()
    return counts(recall(loaded.model, loaded.tokenizer, asked, context=context, examples=examples))


def page(options: Any, rows: dict[str, Any]) -> list[str]:
    """Return the lines of the page."""
    read = [row for key, row in rows.items() if key.startswith("read")]
    gates = [row for key, row in rows.items() if key.startswith("gate")]
    by_way = {way: [row for key, row in rows.items() if key.endswith(f", {way}")] for way in WAYS}
    every = [*read, *(row for some in by_way.values() for row in some)]
    return [
        f"{options.model}; {len(read)} documents of about 240 tokens, {options.seeds} seed(s); greedy; an "
        "answer is right if its first words are. Without the text, no examples are shown. Percent, with "
        "intervals of 95 %.",
        "",
        *recall_table(every, FORMS, "whole text"),
        "",
        *cost_table(by_way),
        "",
        gate_line(gates),
    ]


if __name__ == "__main__":
    main()
