"""The README's results of long-term memory; see write_results.py."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

from saved_results import load, source  # puts the scripts on the path

# isort: split
from common import table
from memories import answered, mean, share
from memory_facts import FORMS
from memory_grounded import MOST, beside_nothing

from everlong.evaluation.forgetting import wrong_documents

SKILLS = ("labels", "format")
BESIDE = {
    "facts": ("memory_facts", FORMS, "whole", ("hard labels", "hard labels + 10 % by lexical search")),
    "skills": ("memory_skills", SKILLS, "all", ("a memory", "a memory + the last 10 %")),
    "words": ("memory_grounded", ("cloze",), "the passage", ("a memory", "a memory + its last 10 %")),
}
"""By kind: the table, its forms, how the names of those with everything begin, and those of memories."""


def memories() -> list[str]:
    """What a memory recalls of invented facts."""
    saved, every = load("memory_facts"), of_what_was_learned("memory_facts", "hard labels")
    model = saved["setting"]["model"]
    shown = {
        "no context": "nothing",
        "whole text, no examples": "the whole text",
        "whole text, matching examples": "the whole text, with examples of such questions",
        "last 10 %, matching examples": "the last tenth of the text, with examples",
        "10 % by lexical search, matching examples": "the tenth that a lexical search finds, with examples",
        "raw text": "an adapter trained on the raw text",
        "soft labels": "a memory, learned with soft labels",
        "hard labels": "a memory, learned with hard labels",
        "hard labels of another document": "such a memory of another document",
        "hard labels + last 10 %": "such a memory, and the last tenth",
        "hard labels + 10 % by lexical search": "such a memory, and the tenth that is found",
        "hard labels, no continuations": "a memory, learned without continuations",
    }
    cells = [
        [name, *(share([row[key][form] for row in every if key in row]) for form in FORMS)]
        for key, name in shown.items()
        if any(key in row for row in every)
    ]
    documents = sum("hard labels" in row for row in every)
    return [
        f"**Remembering.** Facts about invented people that {model} gives, of {documents} documents with 30 "
        "each, by what it has before it or has learned:",
        "",
        *table(["what it has", *(f"{form}s" if form != "reverse" else form for form in FORMS)], cells),
        "",
        "Percent, with intervals of 95 %.",
        source("memory_facts", saved),
    ]


def skills() -> list[str]:
    """What a memory of demonstrations does with inputs that are not among them."""
    saved, rows = load("memory_skills"), of_what_was_learned("memory_skills", "a memory")
    shown = {
        "nothing": "nothing",
        "all demonstrations": "all demonstrations",
        "the last 10 %": "the last tenth of them",
        "raw text": "an adapter trained on the raw text",
        "a memory": "a memory of them",
        "a memory + the last 10 %": "such a memory, and the last tenth",
        "a memory of another skill": "such a memory of another skill",
        "a memory, no continuations": "a memory of them, learned without continuations",
    }
    cells = [
        [name, *(share([row[key][kind] for row in rows if kind in row.get(key, ())]) for kind in SKILLS)]
        for key, name in shown.items()
    ]
    setting = saved["setting"]
    tried = [sum(kind in row.get("a memory", ()) for row in rows) for kind in SKILLS]
    return [
        f"**Learning from examples.** Skills that exist nowhere else, each shown to {setting['model']} by "
        f"{setting['demonstrations']} demonstrations: invented names for kinds of things ({tried[0]} skills) "
        f"and another order of fields, with marks ({tried[1]}). Done right, of {setting['tests']} unseen "
        "inputs each:",
        "",
        *table(["what it has", *SKILLS], cells),
        "",
        "Percent, with intervals of 95 %.",
        source("memory_skills", saved),
    ]


def grounded() -> list[str]:
    """What a memory knows of a real passage."""
    saved = load("memory_grounded")
    rows, setting = saved["rows"], saved["setting"]
    passages = sum("a memory" in row for row in rows.values())
    found = beside_nothing(rows, passages, wrong_documents(MOST, 0))
    shown = {
        "nothing": "nothing",
        "the passage": "the passage",
        "its last 10 %": "its last tenth",
        "raw text": "an adapter trained on the raw text",
        "a memory": "a memory of it",
        "a memory + its last 10 %": "such a memory, and the last tenth",
        "a memory of another passage": "such a memory of another passage",
        "a memory, no continuations": "a memory of it, learned without continuations",
        "a memory, no continuations of another passage": "one of another passage, learned without them",
    }
    cells = []
    for key, name in shown.items():
        losses = [(own["continuation"], bare["continuation"]) for own, bare in found[key]]
        after, before = (fmean(some) for some in zip(*losses, strict=True))
        change = f", {100 * math.expm1(after - before):+.0f} %" if after != before else ""
        cells.append([name, share([own["cloze"] for own, _ in found[key]]), f"{math.exp(after):.0f}{change}"])
    return [
        f"**Learning what one reads.** Words left out of {passages} passages of *{setting['text'].title()}*, "
        f"{setting['tokens']} tokens each, and the perplexity of the {setting['tokens']} tokens that follow, "
        "which nobody learned, with its change against nothing:",
        "",
        *table(["what it has", "words", "what follows"], cells),
        "",
        "Percent, with intervals of 95 %. What it costs other prose, and what was done about it: "
        "[docs/memory.md](docs/memory.md#what-is-measured).",
        source("memory_grounded", saved),
    ]


def beside_the_whole() -> list[str]:
    """How a memory compares with the best prompt that holds everything."""
    cells = [["a memory"], ["a memory, and a tenth of the text"]]
    means: list[list[float]] = [[], []]
    texts = []
    for name, forms, whole, ways in BESIDE.values():
        rows = of_what_was_learned(name, ways[0])
        texts.append(sum(ways[0] in row for row in rows))
        found = answered(rows, forms)
        best = max(mean(by_form) for had, by_form in found.items() if had.startswith(whole))
        for number, way in enumerate(ways):
            means[number].append(100 * mean(found[way]) / best)
    for line, some in zip(cells, means, strict=True):
        line += [f"{percent:.0f}" for percent in (*some, sum(some) / len(some))]
    return [
        "Together, in percent of what the best prompt gives that holds the whole text; of "
        f"{texts[0]}, {texts[1]} and {texts[2]} texts, which is little yet:",
        "",
        *table(["", *BESIDE, "mean"], cells),
    ]


def of_what_was_learned(name: str, way: str) -> list[dict[str, Any]]:
    """Return the rows of texts that were learned in one way, and of the same learned otherwise, or read."""
    rows: dict[str, dict[str, Any]] = load(name)["rows"]
    texts = {_text_of(key) for key in rows if key.startswith("learned") and key.endswith(f", {way}")}
    return [
        row for key, row in rows.items() if key.startswith(("read", "learned")) and _text_of(key) in texts
    ]


def _text_of(key: str) -> str:
    """Return which text a row is of: "labels 2" of "learned labels 2, seed 0, a memory"."""
    return key.partition(",")[0].partition(" ")[2]


def passing() -> list[str]:
    """What a session still knows of what left its window, learned in passing or not."""
    saved = load("memory_passing")
    rows, setting = saved["rows"], saved["setting"]
    passed = rows["window + memory"]
    shown = {
        f"a window of {setting['window']} tokens": rows["window alone"]["recall"],
        "that window, and the memory learned in passing": passed["recall"],
        "that memory alone": passed["memory alone"],
        "a window that holds everything": rows["all in the window"]["recall"],
    }
    return [
        f"**Learning in passing.** {setting['documents']} documents of 30 facts and then "
        f"{setting['tokens']:,} tokens of something else are read; what a session tells of the facts, asked "
        "in the end without examples:",
        "",
        *table(
            ["what it has", *(f"{form}s" if form != "reverse" else form for form in FORMS)],
            [[name, *(share([found[form]]) for form in FORMS)] for name, found in shown.items()],
        ),
        "",
        f"Percent, with intervals of 95 %. {passed['learning']['tokens']:,} tokens were learned, which left "
        f"the window while the first {passed['learning']['read']:,} were read, in "
        f"{passed['learning']['seconds'] / 60:.0f} minutes, with {setting['continuations']} continuations a "
        "pass; the others were only read.",
        source("memory_passing", saved),
    ]
