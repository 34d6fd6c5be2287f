"""What later segments leave of earlier ones, and what learning them all does to what is not learned.

    python benchmarks/memory_sequence.py                                    # 10 segments, replay, one seed
    python benchmarks/memory_sequence.py --ways replay carried separate --seeds 3       # the whole

A text of invented facts is learned by InfiniteICL's default recipe in segments of about 100 tokens and a
dozen facts, with one of three ways to carry what was learned into the next: one adapter through all of them
with earlier pairs rehearsed ("replay"), without that ("carried"), or one for each, combined in the end
("separate"); "replay" also without continuations, readings, or elastic weight consolidation. After every
segment all so far are asked about, with an empty context, as completions and questions. Before the first and
after the last: the perplexity of an unrelated text (a file, or Python's own sources), and an unrelated task,
another document's facts answered with it in the context. Intervals are of 95 %. It can be interrupted and
taken up again after each way and seed; six segments take about 35 minutes with one thread.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from common import RESULTS, Rows, table
from memories import attached, share, with_adapter

import everlong
from everlong.evaluation.facts import FactDocument, fact_documents
from everlong.evaluation.forgetting import Retention, Standing, standing
from everlong.evaluation.probes import Probe
from everlong.evaluation.recall import recall
from everlong.evaluation.texts import first_tokens, standard_library
from everlong.memory.infinite_icl import InfiniteICL
from everlong.memory.memorize import as_one
from everlong.memory.progress import Progress
from everlong.memory.recipes import make_recipe
from everlong.memory.segments import Segment, segments
from everlong.models.loading import LoadedModel, load_model
from everlong.reading.tokens import TextCoder

WAYS: dict[str, dict[str, Any]] = {
    "replay": {},
    "carried": {"carry": "carried"},
    "separate": {"carry": "separate"},
    "replay, no continuations": {"continuations": 0},
    "replay, no readings": {"readings": 0},
    "replay, no ewc": {"ewc": 0.0},
}
"""How segments are learned one after another: changes to the recipe "infinite-icl"."""
FORMS = ("completion", "question")
SEGMENT = 100  # tokens
PEOPLE = 6  # made up for each segment, more than fit
READ = 10  # people of the other document
SETTINGS: dict[str, Any] = {}
"""Changes to it in all ways."""


def main() -> None:
    """Measure what is missing, and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--segments", type=int, default=10)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["replay"], metavar="WAY")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--unrelated", type=Path, help="text file (default: Python's own sources)")
    parser.add_argument("--tokens", type=int, default=2048, help="of the unrelated text")
    parser.add_argument("--output", type=Path, default=RESULTS / "memory_sequence.json")
    options = parser.parse_args()
    setting = {key: getattr(options, key) for key in ("model", "segments", "tokens")}
    recipe = make_recipe(**SETTINGS).values()
    rows = Rows(options.output, {**setting, "text": text_name(options), "recipe": recipe})
    loaded = load_model(options.model)

    @cache
    def before(seed: int) -> Standing:
        return stand(loaded, options, seed)

    for seed, way in itertools.product(range(options.seeds), options.ways):
        rows.get(f"{way}, seed {seed}", lambda w=way, s=seed: in_turn(loaded, options, before(s), w, s))
    rows.write_table("Memories of one segment after another", page(options, rows.rows))


def in_turn(
    loaded: LoadedModel, options: argparse.Namespace, before: Standing, way: str, seed: int
) -> dict[str, Any]:
    """Learn the segments in turn, ask after each, and look at what else has changed."""
    parts, asked = story(loaded, seed, options.segments)
    states: list[Progress] = []
    with everlong.load(loaded.model, tokenizer=loaded.tokenizer) as llm:
        recipe = make_recipe(segment_tokens=SEGMENT, **{**WAYS[way], **SETTINGS})
        learner = InfiniteICL(attached(llm), recipe, seed=seed, force=True)
        learner.learn("".join("".join(part.sentences) for part in parts), on_segment=states.append)
        memories = [as_one(learner, state) for state in states]
    turns, after = [], before
    for turn, memory in enumerate(memories):
        with with_adapter(loaded, memory) as known:
            turns.append([right(known, probes) for probes in asked[: turn + 1]])
            if memory is memories[-1]:
                after = stand(known, options, seed)
    loss, task = after.loss_above(before), after.accuracy_above(before)
    return {
        "turns": turns,
        "loss": [before.loss.mean, after.loss.mean],
        "loss above": [loss.mean, loss.low, loss.high],
        "task": [[each.recall.right, len(each.recall.answered)] for each in (before, after)],
        "task above": [task.mean, task.low, task.high],
        "seconds": sum(states[-1].account.seconds.values()),
    }


def story(loaded: LoadedModel, seed: int, count: int) -> tuple[list[Segment], list[list[Probe]]]:
    """Return the first segments of a text of facts, and what can be asked about each."""
    document, _ = documents(seed, count)
    parts = list(segments([document.text], TextCoder(loaded.tokenizer), SEGMENT))[:count]
    assert len(parts) == count, f"{PEOPLE} people a segment are too few"
    return parts, [probes_of(told_in(document, part.text)) for part in parts]


def documents(seed: int, count: int) -> tuple[FactDocument, FactDocument]:
    """Return one to be learned in so many segments, and a short one to be read, which share no person."""
    learned, other = fact_documents(seed, 2, max(PEOPLE * count, READ))
    people = list(dict.fromkeys(fact.person for fact in other.facts))[:READ]
    told = [sentence for sentence in other.sentences if sentence.startswith(tuple(people))]
    return learned, told_in(other, " ".join(told))


def told_in(document: FactDocument, text: str) -> FactDocument:
    """Return what of a document is told in a text, some of its sentences."""
    sentences = tuple(sentence for sentence in document.sentences if sentence in text)
    facts = tuple(fact for fact in document.facts if fact.before in text)
    return FactDocument(sentences, facts, document.ambiguous)


def probes_of(document: FactDocument) -> list[Probe]:
    """Return what is asked about facts."""
    return [probe for probe in document.probes() if probe.form in FORMS]


def right(loaded: LoadedModel, probes: list[Probe]) -> list[int]:
    """Return how many probes are answered from memory, and how many there are."""
    return [recall(loaded.model, loaded.tokenizer, probes).right, len(probes)]


def stand(loaded: LoadedModel, options: argparse.Namespace, seed: int) -> Standing:
    """Measure what is not learned: an unrelated text, and facts that are read."""
    if options.unrelated:
        excerpt = first_tokens(loaded.tokenizer, options.unrelated, options.tokens)
    else:
        excerpt = standard_library(loaded.tokenizer, options.tokens)
    text = loaded.tokenizer.decode(excerpt.ids, skip_special_tokens=True)
    _, read = documents(seed, options.segments)
    return standing(loaded.model, loaded.tokenizer, text, probes_of(read), context=read.text)


def page(options: argparse.Namespace, rows: dict[str, Any]) -> list[str]:
    """Return the lines of the page."""
    kept, cost, triangles = [], [], []
    for way in WAYS:
        some = {key: row for key, row in rows.items() if key.rpartition(", seed")[0] == way}
        if some:
            every = [row["turns"] for row in some.values()]
            kept.append([way, *remembered(every)])
            cost += [[key, *changed(row)] for key, row in some.items()]
            triangles += ["", f"## {way}", "", *triangle(every).table().splitlines()]
    return [
        f"{options.model}; {options.segments} segments of at most {SEGMENT} tokens, {options.seeds} seed(s); "
        "greedy, nothing in the context. Percent; intervals of 95 %.",
        "",
        *table(["way", *REMEMBERED], kept),
        "",
        f"What is not learned: {options.tokens:,} tokens of {text_name(options)}, and another document's "
        "facts, answered reading it. Intervals are of the change, paired.",
        "",
        *table(["way", *CHANGED], cost),
        *triangles,
    ]


REMEMBERED = (
    *("first segment, when learned", "after the last", "of it"),
    *("every segment, when learned", "after the last"),
)


def remembered(every: list[list[list[list[int]]]]) -> list[str]:
    """Return the cells of what is remembered, seeds taken together."""
    first = [[turns[turn][0] for turns in every] for turn in (0, -1)]
    whole = [[turn[-1] for turns in every for turn in turns], [each for turns in every for each in turns[-1]]]
    then, now = (sum(right for right, _ in some) for some in first)
    of_it = f"{100 * now / then:.0f}" if then else ""
    return [*map(share, first), of_it, *map(share, whole)]


CHANGED = ("perplexity before", "after", "change", "facts read before", "after", "change", "seconds")


def changed(row: dict[str, Any]) -> list[str]:
    """Return the cells of what learning did to what is not learned, and took."""
    return [
        *(f"{math.exp(loss):.2f}" for loss in row["loss"]),
        with_ends(math.expm1(nats) for nats in row["loss above"]),
        *(share([counted]) for counted in row["task"]),
        with_ends(row["task above"]),
        f"{row['seconds']:,.0f}",
    ]


def with_ends(shares: Iterable[float]) -> str:
    """Return a change and the ends of its interval, in percent."""
    change, low, high = (f"{100 * share:+.1f}" for share in shares)
    return f"{change} ({low} to {high})"


def triangle(every: list[list[list[list[int]]]]) -> Retention:
    """Return accuracy by turn and segment, seeds taken together."""
    added = [
        [[sum(n) for n in zip(*cells, strict=True)] for cells in zip(*turn, strict=True)]
        for turn in zip(*every, strict=True)
    ]
    return Retention(tuple(tuple(right / of for right, of in turn) for turn in added))


def text_name(options: argparse.Namespace) -> str:
    """Return what the unrelated text is called."""
    return options.unrelated.stem if options.unrelated else "Python's own sources"


if __name__ == "__main__":
    main()
