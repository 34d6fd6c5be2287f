"""What a memory of demonstrations knows of the skill they show, on inputs that are not among them.

    python benchmarks/memory_skills.py                              # 2 skills of each kind
    python benchmarks/memory_skills.py --skills 5 --seeds 3         # the whole: some hours

A skill is a mapping that exists nowhere else, shown by 32 examples: things get an invented name for their
kind ("labels"), or three fields are put into another order between marks ("format"). Moving letters in the
alphabet ("cipher", with `--kinds`) no model of this size does, whatever it is shown. The demonstrations are
learned by InfiniteICL's default recipe, also without continuations, and by next-token training for about as
many steps; then unseen inputs are tried with nothing before them, with the last demonstrations (a tenth of
them), with all, which is the best prompt there is, and with the memory of another skill of the same kind.
Intervals are of 95 % over the inputs of all skills. With several seeds, the skills of a kind take them in
turn. It can be interrupted and taken up again; about 25 minutes a skill with one thread, of which `--ways`
leaves out some.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from common import RESULTS, Rows
from memories import AS_MANY_STEPS, RAW_TEXT, SHARE, cost_table, counts, learned, recall_table

from everlong.evaluation.forgetting import wrong_documents
from everlong.evaluation.recall import recall
from everlong.evaluation.skills import Skill, skill
from everlong.memory.recipes import make_recipe
from everlong.models.loading import LoadedModel, load_model

DEMONSTRATIONS, TESTS = 32, 24
MOST = 20  # skills of a kind, from which others are drawn
WAYS: dict[str, dict[str, Any]] = {
    "a memory": {},
    "a memory, no continuations": {"continuations": 0},
    "raw text": {**RAW_TEXT, "passes": AS_MANY_STEPS},
}
"""How demonstrations are learned: changes to the recipe "infinite-icl"."""
CONTROLLED = ("a memory", "a memory, no continuations")
"""Which of them is asked with some of the demonstrations too, and about another skill."""


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument(
        "--kinds", nargs="+", choices=("labels", "format", "cipher"), default=["labels", "format"]
    )
    parser.add_argument("--skills", type=int, default=2, help=f"of each kind, at most {MOST}")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--output", type=Path, default=RESULTS / "memory_skills.json")
    options = parser.parse_args()
    if options.skills > MOST:
        parser.error(f"there are at most {MOST} skills of a kind")
    setting = {"model": options.model, "demonstrations": DEMONSTRATIONS, "tests": TESTS}
    rows = Rows(options.output, {**setting, "recipe": make_recipe().values()})
    loaded = load_model(options.model)
    wrong = wrong_documents(MOST, 0)
    for number, kind in itertools.product(range(options.skills), options.kinds):
        seed = number % options.seeds
        one, other = (skill(which, kind, DEMONSTRATIONS, TESTS) for which in (number, wrong[number]))
        rows.get(f"read {kind} {number}", lambda s=one: reading(loaded, s))
        for way in options.ways:
            rows.get(
                f"learned {kind} {number}, seed {seed}, {way}",
                lambda s=one, o=other, n=seed, w=way: learning(loaded, s, o, n, w),
            )
    rows.write_table("Memories of skills", page(options, rows.rows))


def reading(loaded: LoadedModel, shown: Skill) -> dict[str, Any]:
    """Try a skill with nothing learned."""
    return {
        "nothing": score(loaded, shown),
        "all demonstrations": score(loaded, shown, shown.text),
        "the last 10 %": score(loaded, shown, last_demonstrations(shown)),
    }


def learning(loaded: LoadedModel, shown: Skill, other: Skill, seed: int, way: str) -> dict[str, Any]:
    """Learn a skill, and try it."""
    with learned(loaded, shown.text, seed, **WAYS[way]) as (known, cost):
        found: dict[str, Any] = {way: score(known, shown)}
        if way in CONTROLLED:
            found[f"{way} + the last 10 %"] = score(known, shown, last_demonstrations(shown))
            found[f"{way} of another skill"] = score(known, other)
        return found | cost


def last_demonstrations(shown: Skill) -> str:
    """Return the last tenth of the demonstrations, whole ones."""
    every = shown.text.strip().split("\n\n")
    return "\n\n".join(every[-max(1, round(SHARE * len(every))) :])


def score(loaded: LoadedModel, tried: Skill, context: str = "") -> dict[str, list[int]]:
    """Return right answers and inputs, by the kind of skill."""
    found = counts(recall(loaded.model, loaded.tokenizer, tried.probes, context=context, max_new_tokens=24))
    return {tried.kind: found["skill"]}


def page(options: Any, rows: dict[str, Any]) -> list[str]:
    """Return the lines of the page."""
    read = [key.split()[1] for key in rows if key.startswith("read")]
    by_way = {way: [row for key, row in rows.items() if key.endswith(f", {way}")] for way in WAYS}
    kinds = list(dict.fromkeys(read))
    return [
        f"{options.model}; {' and '.join(f'{read.count(kind)} of {kind}' for kind in kinds)}, "
        f"{options.seeds} seed(s); {DEMONSTRATIONS} demonstrations, {TESTS} unseen inputs each; greedy. An "
        "answer is right if its first words are; of a format, if every mark is. Percent, with intervals of "
        "95 %.",
        "",
        *recall_table(list(rows.values()), kinds, "all demonstrations"),
        "",
        *cost_table(by_way),
    ]


if __name__ == "__main__":
    main()
