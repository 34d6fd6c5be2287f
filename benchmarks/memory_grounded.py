"""What a memory knows of a real passage: words left out of it, the passage itself, and what follows it.

    python benchmarks/memory_grounded.py TEXT.txt                             # 4 passages
    python benchmarks/memory_grounded.py TEXT.txt --passages 20 --seeds 3     # the whole: some hours

Passages of 256 tokens from all over a text. Each is learned by InfiniteICL's default recipe, also without
continuations, and by next-token training for about as many steps. Asked for are the content words that its
sentences go on with (cloze), greedily; how well the passage is predicted; and how well the 256 tokens that
follow it there are, which nobody learned. All that with nothing before it; with the passage (not the
passage's own tokens: to copy them says nothing), and its last tenth; and with the memory of another passage.
Intervals are of 95 %: over the words of all passages, and, of perplexities, over passages, as changes
against nothing. With several seeds, passages take them in turn. It can be interrupted and taken up again;
about 15 minutes a passage, of which `--ways` leaves out some.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, Rows, table
from memories import AS_MANY_STEPS, COSTS, RAW_TEXT, SHARE, cost_table, learned, share

from everlong.evaluation.forgetting import wrong_documents
from everlong.evaluation.grounded import Passage, cloze, passage_loss, passages
from everlong.evaluation.loss import surprisal
from everlong.evaluation.recall import context_tail, recall
from everlong.evaluation.statistics import Interval, mean_interval
from everlong.memory.recipes import make_recipe
from everlong.models.loading import LoadedModel, load_model

TOKENS, WORDS = 256, 12  # of a passage; left out of it
MOST = 20  # passages, from which others are drawn
NOTHING = "nothing"
WAYS: dict[str, dict[str, Any]] = {
    "a memory": {},
    "a memory, no continuations": {"continuations": 0},
    "raw text": {**RAW_TEXT, "passes": AS_MANY_STEPS},
}
"""How a passage is learned: changes to the recipe "infinite-icl"."""
CONTROLLED = ("a memory", "a memory, no continuations")
"""Which of them is asked with the passage's end too, and about another passage."""
LOSSES = {"passage": "perplexity of the passage", "continuation": "of what follows"}


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--passages", type=int, default=4, help=f"at most {MOST}")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--output", type=Path, default=RESULTS / "memory_grounded.json")
    options = parser.parse_args()
    if options.passages > MOST:
        parser.error(f"there are at most {MOST} passages")
    setting = {"model": options.model, "text": options.text.stem, "tokens": TOKENS}
    rows = Rows(options.output, {**setting, "recipe": make_recipe().values()})
    loaded = load_model(options.model)
    every = passages(options.text, loaded.tokenizer, TOKENS, MOST, 0)
    wrong = wrong_documents(MOST, 0)
    for number in range(options.passages):
        one, other, seed = every[number], every[wrong[number]], number % options.seeds
        rows.get(f"read {number}", lambda p=one: reading(loaded, p))
        rows.get(f"read {wrong[number]}", lambda p=other: reading(loaded, p))
        for way in options.ways:
            rows.get(
                f"learned {number}, seed {seed}, {way}",
                lambda p=one, o=other, s=seed, w=way: learning(loaded, p, o, s, w),
            )
    rows.write_table("Memories of real passages", page(options, rows.rows, wrong))


def reading(loaded: LoadedModel, passage: Passage) -> dict[str, Any]:
    """Score with nothing learned."""
    loss = passage_loss(loaded.model, loaded.tokenizer, passage)
    read = {
        "cloze": words(loaded, passage, passage.text),
        "continuation": float(loss.continuation_read.mean()),
    }
    return {
        NOTHING: score(loaded, passage),
        "the passage": read,
        "its last 10 %": with_tail(loaded, passage),
    }


def learning(loaded: LoadedModel, passage: Passage, other: Passage, seed: int, way: str) -> dict[str, Any]:
    """Learn a passage, and score."""
    with learned(loaded, passage.text, seed, **WAYS[way]) as (known, cost):
        found: dict[str, Any] = {way: score(known, passage)}
        if way in CONTROLLED:
            found[f"{way} + its last 10 %"] = with_tail(known, passage)
            found[f"{way} of another passage"] = score(known, other)
        return found | cost


def score(loaded: LoadedModel, passage: Passage) -> dict[str, Any]:
    """Return right words, and mean surprisals in nats, nothing read before."""
    return {
        "cloze": words(loaded, passage),
        "passage": float(surprisal(loaded.model, loaded.tokenizer, passage.text).mean()),
        "continuation": float(surprisal(loaded.model, loaded.tokenizer, passage.continuation).mean()),
    }


def with_tail(loaded: LoadedModel, passage: Passage) -> dict[str, Any]:
    """Return right words, and the surprisal of what follows, the end of the passage read before."""
    tail = context_tail(passage.text, SHARE)
    follows = surprisal(loaded.model, loaded.tokenizer, passage.continuation, before=tail)
    return {"cloze": words(loaded, passage, tail), "continuation": float(follows.mean())}


def words(loaded: LoadedModel, passage: Passage, context: str = "") -> list[int]:
    """Return how many of the words left out were written, and how many there are."""
    probes = cloze(passage.text, WORDS, 0)
    return [recall(loaded.model, loaded.tokenizer, probes, context=context).right, len(probes)]


def page(options: Any, rows: dict[str, Any], wrong: Sequence[int]) -> list[str]:
    """Return the lines of the page."""
    by_way = {way: [row for key, row in rows.items() if key.endswith(f", {way}")] for way in WAYS}
    cells = [
        [name, share([found["cloze"] for found, _ in some]), *(perplexity(some, loss) for loss in LOSSES)]
        for name, some in beside_nothing(rows, options.passages, wrong).items()
    ]
    return [
        f"{options.model}; {options.text.stem}; {options.passages} passages of {TOKENS} tokens, "
        f"{options.seeds} seed(s). Percent, and perplexity with its change against nothing in percent; "
        "intervals of 95 %.",
        "",
        *table(["what the model has", "words left out", *LOSSES.values()], cells),
        "",
        *cost_table(by_way),
    ]


def beside_nothing(
    rows: dict[str, Any], passages: int, wrong: Sequence[int]
) -> dict[str, list[tuple[dict[str, Any], dict[str, Any]]]]:
    """Return, by what the model had, what it scored on each of the first passages, and with nothing there."""
    bare = {number_of(key): row[NOTHING] for key, row in rows.items() if key.startswith("read")}
    found: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for key, row in rows.items():
        number = number_of(key)
        if number < passages:  # of others only a memory of these is asked
            for name, scored in row.items():
                if name not in COSTS:
                    about = wrong[number] if name.endswith("of another passage") else number
                    found.setdefault(name, []).append((scored, bare[about]))
    return found


def number_of(key: str) -> int:
    """Return of which passage a row is: 2 of "learned 2, seed 0, a memory"."""
    return int(key.replace(",", " ").split()[1])


def perplexity(some: Sequence[tuple[dict[str, Any], dict[str, Any]]], loss: str) -> str:
    """Return a perplexity, with its change against nothing on the same passages; empty: not measured."""
    pairs = [(found[loss], bare[loss]) for found, bare in some if loss in found]
    if not pairs:
        return ""
    mean = math.exp(sum(found for found, _ in pairs) / len(pairs))
    change = mean_interval([found - bare for found, bare in pairs])
    if not change.mean:
        return f"{mean:.1f}"
    middle, *ends = (f"{100 * math.expm1(nats):+.0f}" for nats in (change.mean, *ends_of(change)))
    return f"{mean:.1f}, {middle}" + (f" ({ends[0]} to {ends[1]})" if ends else "")


def ends_of(interval: Interval) -> list[float]:
    """Return the ends of an interval, if it has any."""
    return [interval.low, interval.high] if math.isfinite(interval.low) else []


if __name__ == "__main__":
    main()
