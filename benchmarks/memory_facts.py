"""What a memory recalls of invented facts, beside the text itself, a part of it, and other training.

    python benchmarks/memory_facts.py                      # 3 documents
    python benchmarks/memory_facts.py --documents 20       # the whole: some hours

Documents of 30 facts about people who exist nowhere else, each asked for as a completion, as a differently
worded question, and in reverse. Every document is learned in several ways, all else equal: by InfiniteICL
with the teacher's distributions (soft labels) and with the responses as they stand (hard labels); from 300
tokens of responses, chosen by gain and at random; and by next-token training on the text. Then the probes
are asked with an empty context; and with the whole text, its last tenth, and the tenth of it that a lexical
search finds for each probe, with and without the memory; and with the memory of another document. Examples
stand before questions where the text does: two kinds, of the questions' own form, and of another. Intervals
are of 95 % over the probes of all documents. It can be interrupted and taken up again; about 12 minutes a
document on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, Rows, table

import everlong
from everlong import MemoryStore
from everlong.evaluation.facts import EXAMPLES_ELSEWHERE, FactDocument, fact_documents, matching_examples
from everlong.evaluation.forgetting import wrong_documents
from everlong.evaluation.recall import Recall, context_tail, recall, retrieved_context
from everlong.evaluation.statistics import share_interval
from everlong.memory.lexical import LexicalIndex
from everlong.models.loading import LoadedModel, load_model

FORMS = ("completion", "question", "reverse")
SHARE = 0.1  # of the text
WAYS: dict[str, dict[str, Any]] = {
    "hard labels": {"targets": "hard"},
    "soft labels": {"targets": "soft"},
    "300 tokens, by gain": {"targets": "soft", "budget": 300},
    "300 tokens, at random": {"targets": "soft", "budget": 300, "selection": "random"},
    "raw text": {"generators": ("text",), "selection": "all", "targets": "hard"},
}
"""How a document is learned: changes to the recipe "infinite-icl"."""
CONTROLLED = "hard labels"
"""Which of them is asked with a part of the text too, and about another document."""


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
    rows = Rows(options.output, {"model": options.model})
    loaded = load_model(options.model)
    every = fact_documents(0, 20)
    documents = every[: options.documents]
    wrong = wrong_documents(20, 0)
    for way, seed in itertools.product(options.ways, range(options.seeds)):
        for number, document in enumerate(documents):
            rows.get(f"read {number}", lambda d=document: reading(loaded, d))
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
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        with everlong.load(loaded.model, tokenizer=loaded.tokenizer) as llm:
            memory = llm.memorize(
                document.text, "facts", seed=seed, store=MemoryStore(folder), force=True, **WAYS[way]
            )
        adapted = PeftModel.from_pretrained(loaded.model, str(memory.path))
        learned = dataclasses.replace(loaded, model=adapted)
        found: dict[str, Any] = {way: score(learned, document)}
        if way == CONTROLLED:
            parts = [retrieved(document, probe.prompt) for probe in document.probes()]
            found[f"{way} + last 10 %"] = score(learned, document, context_tail(document.text, SHARE))
            found[f"{way} + 10 % by lexical search"] = score(learned, document, parts)
            found[f"{way} of another document"] = score(learned, other)
        adapted.unload()
        return {**found, COSTS[0]: len(memory.pairs()), COSTS[1]: memory.record.seconds}


def retrieved(document: FactDocument, prompt: str) -> str:
    """Return the tenth of a document that a lexical search finds."""
    return retrieved_context(LexicalIndex(document.sentences), document.sentences, prompt, SHARE)


def score(
    loaded: LoadedModel, document: FactDocument, context: Any = "", examples: str = ""
) -> dict[str, list[int]]:
    """Return right answers and probes, by form."""
    asked = document.probes()
    found: Recall = recall(loaded.model, loaded.tokenizer, asked, context=context, examples=examples)
    return {form: [found.of(form).right, len(found.of(form).answered)] for form in FORMS}


COSTS = ("pairs", "seconds")


def page(options: Any, rows: dict[str, Any]) -> list[str]:
    """Return the lines of the page."""
    read = [row for key, row in rows.items() if key.startswith("read")]
    learned = {way: [row for key, row in rows.items() if key.endswith(f", {way}")] for way in WAYS}
    every = [*read, *(row for some in learned.values() for row in some)]
    names = dict.fromkeys(name for row in every for name in row if name not in COSTS)
    cells = []
    for name in names:
        found = [row[name] for row in every if name in row]
        cells.append([name, *(share([row[form] for row in found]) for form in FORMS), mean(found)])
    cost = [
        [way, *(f"{sum(row[what] for row in some) / len(some):,.0f}" for what in COSTS)]
        for way, some in learned.items()
    ]
    return [
        f"{options.model}; {len(read)} documents of about 240 tokens, {options.seeds} seed(s); greedy; an "
        "answer is right if its first words are. Without the text, no examples are shown. Percent, with "
        "intervals of 95 %.",
        "",
        *table(["what the model has", *FORMS, "mean"], cells),
        "",
        *table(["learned by", *COSTS], cost),
    ]


def share(counts: list[list[int]]) -> str:
    """Return a share with its interval, in percent."""
    right, of = (sum(each[i] for each in counts) for i in (0, 1))
    found = share_interval(right, of)
    return f"{100 * right / of:.0f} ({100 * found.low:.0f} to {100 * found.high:.0f})"


def mean(found: list[dict[str, list[int]]]) -> str:
    """Return the mean over forms, in percent."""
    shares = [sum(row[form][0] for row in found) / sum(row[form][1] for row in found) for form in FORMS]
    return f"{100 * sum(shares) / len(shares):.0f}"


if __name__ == "__main__":
    main()
