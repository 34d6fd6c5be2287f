"""What a memory recalls of invented facts, beside the text itself, a part of it, and other training.

    python benchmarks/memory_facts.py                      # 3 documents
    python benchmarks/memory_facts.py --documents 20       # the whole: some hours

Documents of 30 facts about people who exist nowhere else, each asked for as a completion, as a differently
worded question, and in reverse. Every document is learned in several ways, all else equal: by InfiniteICL, by
InfiniteICL from as many tokens of randomly chosen pairs, by it from the responses alone (hard labels), and by
next-token training on the text. Then the probes are asked with an empty context; and with the whole text, its
last tenth, and the tenth of it that a lexical search finds for each probe, with and without the memory; and
with the memory of another document. Examples stand before questions where the text does: two kinds, of the
questions' own form, and of another; the better one is "best prompting". Intervals are of 95 % over the probes
of all documents. It can be interrupted and taken up again.
"""

from __future__ import annotations

import argparse
import dataclasses
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
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "InfiniteICL": ("infinite-icl", {}),
    "random selection": ("infinite-icl", {"selection": "random"}),
    "hard labels": ("infinite-icl", {"targets": "hard"}),
    "raw text": ("infinite-icl", {"generators": ("text",), "selection": "all", "targets": "hard"}),
}
"""How a document is learned: a recipe, and changes to it."""


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--documents", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--budget", type=int, default=300, help="tokens of responses a segment, where chosen")
    parser.add_argument("--output", type=Path, default=RESULTS / "memory_facts.json")
    options = parser.parse_args()
    rows = Rows(options.output, {"model": options.model, "budget": options.budget})
    loaded = load_model(options.model)
    documents = fact_documents(0, 20)[: options.documents]
    wrong = wrong_documents(len(documents), 0)
    for number, document in enumerate(documents):
        rows.get(f"read {number}", lambda d=document: reading(loaded, d))
        for seed in range(options.seeds):
            other = documents[wrong[number]]
            rows.get(
                f"learned {number}, seed {seed}",
                lambda d=document, o=other, s=seed: learning(loaded, d, o, s, options.budget),
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
    loaded: LoadedModel, document: FactDocument, other: FactDocument, seed: int, budget: int
) -> dict[str, Any]:
    """Learn a document in every way, and ask."""
    from peft import PeftModel

    probes = document.probes()
    parts = [retrieved(document, probe.prompt) for probe in probes]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = MemoryStore(folder)
        for way, (recipe, changes) in WAYS.items():
            with everlong.load(loaded.model, tokenizer=loaded.tokenizer) as llm:
                memory = llm.memorize(
                    document.text,
                    way.replace(" ", "-"),
                    recipe,
                    seed=seed,
                    store=store,
                    force=True,
                    **{"budget": budget, **changes},
                )
            adapted = PeftModel.from_pretrained(loaded.model, str(memory.path))
            with_memory = dataclasses.replace(loaded, model=adapted)
            found[way] = score(with_memory, document)
            found[f"{way}: seconds"] = memory.record.seconds
            found[f"{way}: pairs"] = len(memory.pairs())
            if way == "InfiniteICL":
                tail = context_tail(document.text, SHARE)
                found["InfiniteICL + last 10 %"] = score(with_memory, document, tail)
                found["InfiniteICL + 10 % by lexical search"] = score(with_memory, document, parts)
                found["InfiniteICL of another document"] = score(with_memory, other)
            adapted.unload()
    return found


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


def page(options: Any, rows: dict[str, Any]) -> list[str]:
    """Return the lines of the page."""
    read = [row for key, row in rows.items() if key.startswith("read")]
    learned = [row for key, row in rows.items() if key.startswith("learned")]
    names = [name for row in (read[0], learned[0]) for name in row if ":" not in name]
    cells = []
    for name in names:
        found = [row[name] for row in (*read, *learned) if name in row]
        cells.append([name, *(share([row[form] for row in found]) for form in FORMS), mean(found)])
    cost = [
        [way, *(f"{sum(row[f'{way}: {what}'] for row in learned) / len(learned):,.0f}" for what in COSTS)]
        for way in WAYS
    ]
    return [
        f"{options.model}; {len(read)} documents of about 240 tokens, {len(learned)} times learned; greedy; an "
        "answer is right if its first words are. Where pairs are chosen, their responses have "
        f"{options.budget} tokens at most. Without the text, no examples are shown. Percent, 95 % intervals.",
        "",
        *table(["what the model has", *FORMS, "mean"], cells),
        "",
        *table(["learned by", *COSTS], cost),
    ]


COSTS = ("pairs", "seconds")


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
