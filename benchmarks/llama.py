"""llama.cpp on a GGUF file, in an environment of its own: found, built, and asked for its speeds.

Run by that environment's Python, this file measures and prints JSON; imported, it starts that process. It
needs nothing but the standard library, and ``llama-cpp-python`` where it measures.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

ENVIRONMENT = Path(__file__).parents[1] / ".venv-llama"
PACKAGE = "llama-cpp-python"
SPARE = 64  # tokens of room beyond the longest prompt


def python_of(environment: Path) -> Path:
    """Return the environment's Python."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def missing(environment: Path) -> str | None:
    """Say why llama.cpp cannot be measured; None: it can."""
    python = python_of(environment)
    if not python.exists():
        return f"there is no environment {environment.name}; --build-llama builds it, in minutes"
    tried = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, text=True)
    if tried.returncode:
        last = (tried.stderr.strip().splitlines() or ["no reason given"])[-1]
        return f"{PACKAGE} does not work in {environment.name} ({last}); --build-llama installs it anew"
    return None


def build(environment: Path) -> None:
    """Make the environment and compile llama.cpp there."""
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    pip = [str(python_of(environment)), "-m", "pip", "install", "--force-reinstall", PACKAGE]
    subprocess.run(pip, check=True)


def speeds(environment: Path, gguf: Path, *, threads: int, repeats: int, prompts: list[int]) -> Any:
    """Measure in a process of the environment's Python; see :func:`measure`."""
    command = [str(python_of(environment)), __file__, str(gguf), "--threads", str(threads)]
    command += ["--repeats", str(repeats), "--prompts", *map(str, prompts)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 1024, 8192])
    print(json.dumps(measure(parser.parse_args())))


def measure(options: Any) -> dict[str, Any]:
    """Measure without and with flash attention, and keep the faster for each figure.

    Returns
    -------
    dict
        ``decode_ms`` a token at `context` tokens: the median of `repeats` medians of `steps`; ``prefill``,
        tokens per second of each prompt on an empty context: the median of `repeats`, but once for prompts of
        more than four times `context`, the longest ones; and the package's ``version``.
    """
    import llama_cpp

    found = [with_flash(options, flash) for flash in (False, True)]
    return {
        "version": llama_cpp.__version__,
        "threads": options.threads,
        "decode_ms": min(each["decode_ms"] for each in found),
        "prefill": {n: max(each["prefill"][n] for each in found) for n in options.prompts},
        "decode_ms_of": [each["decode_ms"] for each in found],
        "prefill_of": [each["prefill"] for each in found],
    }


def with_flash(options: Any, flash: bool) -> dict[str, Any]:
    """Measure one way of attending."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(options.gguf),
        n_ctx=max(*options.prompts, options.context + options.steps) + SPARE,
        n_threads=options.threads,
        n_threads_batch=options.threads,
        flash_attn=flash,
        verbose=False,
    )
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(model.n_vocab()) for _ in range(count)]

    def seconds(given: list[int]) -> float:
        started = time.perf_counter()
        model.eval(given)
        llama_cpp.llama_synchronize(model.ctx)
        return time.perf_counter() - started

    prefill = {}
    for count in options.prompts:
        times = []
        for _ in range(1 if count > 4 * options.context else options.repeats):
            model.reset()
            times.append(seconds(tokens(count)))
        prefill[count] = count / median(times)
    model.reset()
    model.eval(tokens(options.context))
    decode = []
    for _ in range(options.repeats):
        model.n_tokens = options.context  # what comes next takes the place of what came after
        decode.append(median(seconds(tokens(1)) for _ in range(options.steps)))
    return {"decode_ms": 1000 * median(decode), "prefill": prefill}


if __name__ == "__main__":
    main()
