"""How long a model takes to be ready, from the start of the process.

    python benchmarks/start_up.py

Each figure is the median of 5 fresh processes, the page cache warm and the model converted already: importing
the package, the command line's help, ``everlong.load()`` with float and with packed weights, and the first
token of ``everlong generate``. A model that is packed is packed when it first writes. Beside them stands what
others take: importing PyTorch, importing what transformers loads a model with, and transformers' own
``from_pretrained`` of the same folder. 3 to 8 minutes on 2 CPU cores, which must be quiet.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from common import RESULTS, Rows, table

from everlong.models.store import Store

IN_PARTS = """
import gc, sys, time
model, weights = sys.argv[1:]
import everlong
load = everlong.load
at = [time.time()]
from everlong.models.collector import old_objects_left_out
from everlong.models.loading import load_model
with old_objects_left_out():  # as load() has it
    loaded = load_model(model)
    at.append(time.time())
    llm = load(loaded.model, tokenizer=loaded.tokenizer, weights=weights)
at.append(time.time())
gc.collect()
at.append(time.time())
for _ in range(2):
    session = llm.session()
    session.read("Once upon a time")
    session.generate(1)
    at.append(time.time())
print(at)
"""
STOCK = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer; AutoTokenizer.from_pretrained({0!r}); "
    "AutoModelForCausalLM.from_pretrained({0!r}, dtype='float32')"
)
WEIGHTS = ("float", "auto")
PARTS = ("imports", "weights", "attaching", "full collection", "first token", "token of another session")


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "start_up.json")
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed has been compiled
    rows = Rows(options.output, {"model": options.model, "repeats": options.repeats})

    def of_several(measure: Any, *arguments: str) -> Any:
        if options.repeats > 1:
            measure(*arguments)  # brings files into the page cache
        return [measure(*arguments) for _ in range(options.repeats)]

    load = "import everlong; everlong.load({!r}, weights={!r})"
    folder = options.model if Path(options.model).is_dir() else str(Store().pull(options.model))
    whole = {
        "import torch": ("-c", "import torch"),
        "transformers' class of models, imported": ("-c", "from transformers import PreTrainedModel"),
        "the same model by transformers alone": ("-c", STOCK.format(folder)),
        "import everlong": ("-c", "import everlong"),
        "everlong --help": ("-m", "everlong", "--help"),
        **{f"load, {weights}": ("-c", load.format(options.model, weights)) for weights in WEIGHTS},
    }
    seconds = {
        name: median(rows.get(name, lambda a=arguments: of_several(until_done, *a)))
        for name, arguments in whole.items()
    }
    generate = ["-m", "everlong", "generate", "Once upon a time", "--max-new-tokens", "1"]
    generate += ["--model", options.model]
    name = "everlong generate, to its first token"
    seconds[name] = median(rows.get(name, lambda: of_several(until_written, *generate)))
    lines = [
        f"{options.model}, converted already; seconds from the start of a process, medians of "
        f"{options.repeats}. Packed weights are made when a model first writes: the first token waits for "
        "them.",
        "",
        *table(["", "seconds"], [[name, f"{value:.2f}"] for name, value in seconds.items()]),
        "",
        "In parts; packing is what the first token of the first session takes longer than that of another. "
        "Python's garbage collector looks through everything once in the minutes after loading.",
        "",
        *table(
            ["weights", *PARTS[:5], "packing"],
            [split(rows, weights, of_several) for weights in WEIGHTS],
        ),
    ]
    rows.write_table("From the start of a process to a model that is ready", lines)


def until_done(*arguments: str) -> float:
    """Seconds from the start of a Python process until its script has run; leaving Python does not count."""
    began = time.time()
    if arguments[0] != "-c":
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        return time.time() - began
    script = f"{arguments[1]}; import time; print(time.time())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    return float(done.stdout.splitlines()[-1]) - began


def until_written(*arguments: str) -> float:
    """Seconds from the start of a Python process until it has written something to standard output."""
    began = time.time()
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1), "nothing was written"
        seconds = time.time() - began
        process.stdout.read()
    return seconds


def split(rows: Rows, weights: str, of_several: Any) -> list[str]:
    """One line of the table of parts."""

    def once() -> dict[str, float]:
        command = [sys.executable, "-c", IN_PARTS, rows.setting["model"], weights]
        began = time.time()
        done = subprocess.run(command, capture_output=True, check=True, text=True)
        at = [began, *json.loads(done.stdout.splitlines()[-1])]
        return {part: at[i + 1] - at[i] for i, part in enumerate(PARTS)}

    found = rows.get(f"parts, {weights}", lambda: of_several(once))
    parts = {part: median(each[part] for each in found) for part in PARTS}
    packing = median(each[PARTS[4]] - each[PARTS[5]] for each in found)
    return [weights, *(f"{parts[part]:.2f}" for part in PARTS[:5]), f"{packing:.2f}"]


if __name__ == "__main__":
    main()
