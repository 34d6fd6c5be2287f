"""Which memory answers when one is chosen for each question, and what that spares what is unrelated.

    python benchmarks/memory_routing.py                    # 4 documents
    python benchmarks/memory_routing.py --documents 10

Each document of invented facts (see memory_facts.py) becomes a memory. Probes of all documents are asked in
sessions that have no memory, the right one given by hand, all of them at once, or choose for themselves: by
the pairs alone, or with the entropy gate behind, as `memories="auto"` does. Three kinds of question belong
to no memory: about invented people of another document; general knowledge with a known answer; and everyday
ones, some in words that the memories have too. The unrelated text is the standard library's argparse.py.
Where a memory is given by hand and none is right, it is each of them in turn. Intervals are of 95 % over
probes. It can be interrupted and taken up again; some 9 minutes a document for learning with one
thread, and a quarter of an hour for asking about six. The memories stay in a store of their own.
"""

from __future__ import annotations

import argparse
import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from common import RESULTS, Rows, table

import everlong
from everlong import LLM, MemoryStore, Session
from everlong.evaluation.facts import FactDocument, fact_documents
from everlong.evaluation.probes import Probe, is_answer
from everlong.evaluation.statistics import share_interval
from everlong.evaluation.texts import first_tokens
from everlong.models.store import default_home
from everlong.reading.reports import Generation

BY_HAND, ALL, SHARED = "the right one, by hand", "all, each with weight 1", "all, with equal shares of 1"
BY_PAIRS, AUTO = "auto, by the pairs alone", "auto"
WAYS = ("no memory", BY_HAND, ALL, SHARED, BY_PAIRS, AUTO)
FORMS = ("completion", "question", "reverse")
SCORED = (*FORMS, "general knowledge")
WENT = ("right", "wrong", "none")
OTHERS = ("about unknown people", "general knowledge", "everyday")
TOGETHER = 16  # probes
TOKENS = 12  # of an answer, at most

GENERAL = {
    "What is the capital of France?": "Paris",
    "What is the capital of Italy?": "Rome",
    "What is the capital of Japan?": "Tokyo",
    "What is the capital of Egypt?": "Cairo",
    "What is the largest planet?": "Jupiter",
    "What is the chemical symbol of water?": "H2O",
    "Who wrote Romeo and Juliet?": "William Shakespeare|Shakespeare",
    "Who wrote Pride and Prejudice?": "Jane Austen|Austen",
    "Who painted the Mona Lisa?": "Leonardo da Vinci|Leonardo|da Vinci",
    "Who discovered penicillin?": "Alexander Fleming|Fleming",
    "How many days are in a week?": "7|seven",
    "How many legs does a spider have?": "8|eight",
    "How many minutes are in an hour?": "60|sixty",
    "What colour is the sky?": "blue",
    "What do bees make?": "honey",
    "What language is spoken in Brazil?": "Portuguese",
    "Which ocean is the largest?": "Pacific|Pacific Ocean",
    "On which continent is Kenya?": "Africa",
    "What is the opposite of hot?": "cold",
    "What is two plus two?": "4|four",
}
"""Questions that many models can answer by themselves, and their answers."""
EVERYDAY = (
    *("Where can I buy fresh bread?", "When does the next train leave?", "Who plays the violin best?"),
    *("What does a teacher earn?", "Where do most people live?", "How do I teach a dog to sit?"),
    *("What should I drink with cheese?", "When is a good time to plant roses?", "How do I learn to swim?"),
    *("What is a good name for a cat?", "Where does coffee grow?", "Who was born in January?"),
    *("Write a poem about autumn.", "Translate 'good morning' into Spanish.", "Tell me a joke."),
    *("Which colour goes with green?", "How do I fix a flat tyre?", "What is the favourite sport of many?"),
)


@dataclass(frozen=True)
class Asked:
    """What is asked.

    Attributes
    ----------
    prompt : str
        The beginning of a sentence, or a question.
    kind : str
        One of `FORMS`, if a document answers it, or one of `OTHERS`.
    document : int or None
        The document it is about; None: none.
    probe : Probe or None
        What is an answer; None: that is not known.
    """

    prompt: str
    kind: str
    document: int | None = None
    probe: Probe | None = None


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--probes", type=int, default=20, help="of each form and document, at most")
    parser.add_argument("--tokens", type=int, default=2048, help="of the unrelated text")
    parser.add_argument("--store", type=Path, default=default_home() / "benchmarks" / "memory_routing")
    parser.add_argument("--output", type=Path, default=RESULTS / "memory_routing.json")
    options = parser.parse_args()
    setting = {name: getattr(options, name) for name in ("model", "documents", "probes", "tokens")}
    rows, store = Rows(options.output, setting), MemoryStore(options.store)
    *documents, strange = fact_documents(0, options.documents + 1)
    asked = probes(documents, strange, options.probes)
    with everlong.load(options.model, weights="float") as llm:
        for number, document in enumerate(documents):
            rows.get(f"learned {number}", lambda n=number, d=document: learning(llm, store, n, d))
        names = [f"document-{number}" for number in range(options.documents)]
        for way in WAYS:
            rows.get(f"asked, {way}", lambda w=way: asking(llm, store, names, asked, w))
            rows.get(f"read, {way}", lambda w=way: reading(llm, store, names, options.tokens, w))
    rows.write_table("Memories chosen for each question", page(options, rows.rows))


def probes(documents: Sequence[FactDocument], strange: FactDocument, most: int) -> list[Asked]:
    """Return what is asked: some of each form about each document, and what is about none."""
    found = []
    for number, document in enumerate(documents):
        for form in FORMS:
            found += [Asked(of(probe), form, number, probe) for probe in some(document, form, most)]
    for form in FORMS:
        found += [Asked(of(probe), OTHERS[0]) for probe in some(strange, form, most)]
    for question, answers in GENERAL.items():
        found.append(Asked(question, OTHERS[1], None, Probe(question, tuple(answers.split("|")), "question")))
    return found + [Asked(question, OTHERS[2]) for question in EVERYDAY]


def some(document: FactDocument, form: str, most: int) -> list[Probe]:
    """Return probes of one form, spread over a document."""
    found = [probe for probe in document.probes() if probe.form == form]
    return found[:: -(-len(found) // most)] if found else []


def of(probe: Probe) -> str:
    """Return a probe's question, or the beginning of its sentence."""
    return probe.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")


def learning(llm: LLM, store: MemoryStore, number: int, document: FactDocument) -> dict[str, Any]:
    """Turn a document into a memory, unless it was before."""
    name = f"document-{number}"
    if name not in [memory.name for memory in store.list()]:
        llm.memorize(document.text, name, store=store, force=True)
    memory = store.get(name)
    return {"pairs": len(memory.pairs()), "seconds": memory.record.seconds}


def session_of(
    llm: LLM, store: MemoryStore, names: Sequence[str], right: int, way: str, **options: Any
) -> Session:
    """Begin a session that has memories in one of the `WAYS`."""
    memories = {
        "no memory": [],
        BY_HAND: [names[right]],
        BY_PAIRS: ["auto", *names],
        AUTO: ["auto", *names],
    }.get(way, names)
    weights = [1 / len(names)] * len(names) if way == SHARED else None
    session = llm.session(memories=memories, memory_weights=weights, store=store, **options)
    if way == BY_PAIRS:
        router: Any = session.memories
        router.is_surer = lambda *_: True
    return session


def asking(
    llm: LLM, store: MemoryStore, names: Sequence[str], asked: Sequence[Asked], way: str
) -> list[dict[str, Any]]:
    """Ask everything in one of the `WAYS`; a row for each probe."""
    sessions = [session_of(llm, store, names, number, way) for number in range(len(names))]
    found = []
    for begin in range(0, len(asked), TOGETHER):
        group = asked[begin : begin + TOGETHER]
        turns = [begin + i if one.document is None else one.document for i, one in enumerate(group)]
        own = [sessions[turn % len(names)].fork() for turn in turns]
        for one, answer in zip(group, answers(llm, own, group), strict=True):
            found.append(
                {
                    "prompt": one.prompt,
                    "kind": one.kind,
                    "document": one.document,
                    "memories": list(answer.memories),  # as they are kept
                    "answer": answer.text.strip(),
                    "right": None if one.probe is None else is_answer(answer.text, one.probe),
                }
            )
    return found


def answers(llm: LLM, sessions: Sequence[Session], group: Sequence[Asked]) -> list[Generation]:
    """Let each session go on with the beginning of a sentence, or answer a question."""
    found: dict[int, Generation] = {}
    goes_on = [i for i, one in enumerate(group) if one.kind == "completion"]
    asks = [i for i in range(len(group)) if i not in goes_on]
    for i in goes_on:
        sessions[i].read(group[i].prompt)
    if goes_on:
        written = llm.generate_together([sessions[i] for i in goes_on], TOKENS, stop="\n")
        found |= dict(zip(goes_on, written, strict=True))
    if asks:
        questions = [group[i].prompt for i in asks]
        written = llm.ask_together([sessions[i] for i in asks], questions, max_new_tokens=TOKENS)
        found |= dict(zip(asks, written, strict=True))
    return [found[i] for i in range(len(group))]


def reading(llm: LLM, store: MemoryStore, names: Sequence[str], tokens: int, way: str) -> list[float]:
    """Return the perplexity of an unrelated text, with each memory in turn where one is given by hand."""
    text = first_tokens(llm.tokenizer, Path(inspect.getfile(argparse)), tokens)
    found = []
    for number in range(len(names) if way == BY_HAND else 1):
        session = session_of(llm, store, names, number, way, surprisal=True)
        found.append(session.read(text.ids.tolist()).perplexity)
    return found


def page(options: Any, rows: dict[str, Any]) -> list[str]:
    """Return the lines of the page."""
    asked = {way: rows[f"asked, {way}"] for way in WAYS}
    learned = [rows[f"learned {number}"]["seconds"] for number in range(options.documents)]
    routed = []
    for kind in (*FORMS, *OTHERS):
        cells = [kind, str(sum(row["kind"] == kind for row in asked[AUTO]))]
        for way in (BY_PAIRS, AUTO):
            went = Counter(outcome(row) for row in asked[way] if row["kind"] == kind)
            cells += [f"{100 * went[name] / went.total():.0f}" for name in WENT]
        routed.append(cells)
    scored = []
    for way in WAYS:
        right = [[row["right"] for row in asked[way] if row["kind"] == kind] for kind in SCORED]
        scored.append([way, *map(share, right), f"{fmean(rows[f'read, {way}']):.2f}"])
    return [
        f"{options.model}; {options.documents} memories of documents of about 240 tokens, learned in "
        f"{fmean(learned):.0f} s each; greedy; an answer is right if its first words are. "
        "Percent, with intervals of 95 %.",
        "",
        "Which memory answered: chosen by the pairs alone, and with the entropy gate behind.",
        "",
        *table(
            ["asked", "probes", *(f"{name}{gate}" for gate in (", by the pairs", "") for name in WENT)],
            routed,
        ),
        "",
        "How many were answered right, and the perplexity of an unrelated text.",
        "",
        *table(["what the model has", *SCORED, "perplexity"], scored),
    ]


def outcome(row: dict[str, Any]) -> str:
    """Return whether an answer had the right memory, a wrong one, or none."""
    if not row["memories"]:
        return "none"
    return "right" if row["memories"] == [f"document-{row['document']}"] else "wrong"


def share(right: list[bool]) -> str:
    """Return a share with its interval, in percent."""
    found = share_interval(sum(right), len(right))
    return f"{100 * sum(right) / len(right):.0f} ({100 * found.low:.0f} to {100 * found.high:.0f})"


if __name__ == "__main__":
    main()
