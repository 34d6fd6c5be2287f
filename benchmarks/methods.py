"""Every method side by side, in long texts of several kinds: what `everlong bench methods` measures.

    python benchmarks/methods.py                                        # SmolLM2, 4,096 tokens
    python benchmarks/methods.py --model gemma-3-270m
    python benchmarks/methods.py --lengths 4k,8k,16k,32k                # the whole: many hours

The command writes its own page, with pictures, and what was measured beside it, as JSON; this script calls it
and writes a page of tables from that. All registered methods that can run with the model read the same texts,
those that have a window with one of 2,048 tokens; stock, which sees all there is, and the stock model on cut
texts are always among them. Other options are the command's. It can be interrupted and taken up again after
each text. The first of these takes about half an hour with one thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, table
from passkey import costs, counted

from everlong.evaluation.finding import Found, FoundShare, shares
from everlong.evaluation.resources import machine_line

TASKS = "passkey,niah"
AWARE = "*"


def main() -> None:
    """Measure what is missing, and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--lengths", default="4k")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--output", type=Path, help="HTML file (default: results/methods_MODEL.html)")
    options, others = parser.parse_known_args()
    output: Path = options.output or RESULTS / f"methods_{Path(options.model).name}.html"
    command = ["everlong", "bench", "methods", *others]
    for name in ("model", "lengths", "samples", "tasks"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run([sys.executable, "-m", *command, "--output", str(output)])
    if done.returncode:
        raise SystemExit(done.returncode)  # the command has said why
    saved = json.loads(output.with_suffix(".json").read_text())
    text = "\n".join(page(saved, " ".join(command)))
    output.with_suffix(".md").write_text(text + "\n")
    print(text)


def page(saved: dict[str, Any], command: str) -> list[str]:
    """Return the lines of the page, of all that was ever measured into one file.

    Raises
    ------
    SystemExit
        Some of it was measured otherwise: by another number of texts, or with other options.
    """
    plans = {key.rpartition(", ")[0] + key.rpartition(" of ")[2] for key in saved["rows"]}
    every = shares([Found.restored(row) for row in saved["rows"].values()])
    if len(plans) > len(every):
        raise SystemExit("the file holds rows of several plans: give another --output, or move it away")
    lines = [
        "# Methods side by side",
        "",
        *(line for named in machine_lines(saved["machines"]) for line in (named, "")),
        f"{saved['setting']['model']}, by `{command}`. Methods that have a window have one of 2,048 tokens, "
        "unless the command says otherwise. Of how many texts all was told that was asked for; in brackets "
        "the mean percentage told, of a passkey of its digits before the first mistake. Stock sees all there "
        "is; last and first-and-last are the stock model, the text cut to the window. "
        f"{AWARE} chose what to keep when it had read the question.",
    ]
    where = measured_on(saved)
    for length in sorted({share.length for share in every}):
        some = [share for share in every if share.length == length]
        lines += ["", f"## {length:,} tokens", "", *told(some)]
        lines += ["", f"What that takes ({some[0].task}; medians, by the clock, whatever else ran):", ""]
        lines += table(
            ["", "read", "seen by a token", "forgotten", "window", "tier", "tokens/s", "ms to write a token"]
            + ["machine"] * bool(where),
            [
                costs(share) + ([where[share.way, share.task, length]] if where else [])
                for share in some
                if share.task == some[0].task
            ],
        )
    return lines


def machine_lines(machines: Sequence[dict[str, Any]]) -> list[str]:
    """Return what ran the texts, numbered if that is more than one machine or day."""
    if len(machines) == 1:
        return [machine_line(machines[0])]
    return [f"Machine {number}: {machine_line(machine)}" for number, machine in enumerate(machines, 1)]


def measured_on(saved: dict[str, Any]) -> dict[tuple[str, str, int], str]:
    """Return the numbers of the machines by way, task and length; nothing where there is but one."""
    if len(saved["machines"]) == 1:
        return {}
    found: dict[tuple[str, str, int], set[int]] = {}
    for key, row in saved["rows"].items():
        numbers = found.setdefault((row["way"], row["task"], row["length"]), set())
        numbers.update({saved.get("measured_on", {}).get(key, -1) + 1})
    return {what: ", ".join(str(n) if n else "?" for n in sorted(some)) for what, some in found.items()}


def told(some: Sequence[FoundShare]) -> list[str]:
    """Return a table of what was told, a row for each way to read."""
    tasks = list(dict.fromkeys(share.task for share in some))
    found = {(share.way, share.task): f"{counted(share)} [{100 * share.told.mean:.0f}]" for share in some}
    marked = {share.way: share.way + AWARE * share.is_query_aware for share in some}
    return table(
        ["", *tasks],
        [[shown, *(found.get((way, task), "") for task in tasks)] for way, shown in marked.items()],
    )


if __name__ == "__main__":
    main()
