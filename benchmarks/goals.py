"""How fast against stock transformers, llama.cpp and the machine itself: goals, and what was reached.

    python benchmarks/goals.py [--build-llama]

Weights packed in 4 bits for writing, threads that spin briefly (as the ``everlong`` command has them), every
part in a process of its own. What ``everlong bench speed`` measures, stock and ours in turn, at 1,024, 8,192
and 32,768 tokens; prompts, and steps in full windows, beside llama.cpp on the same GGUF file with as many
threads; and the whole prefill of 32,768 tokens, once each. About 20 minutes on 2 CPU cores, which must be
quiet. Every row is kept, so it can be interrupted.

llama.cpp (the package llama-cpp-python) is looked for in ``.venv-llama``; ``--build-llama`` builds it there,
which takes minutes and a compiler. Without it the page says so. What a million tokens cost, and what kernels
take within a step, is taken from what ``bounded.py`` and ``profile_step.py`` wrote beside our output; another
machine has a folder of its own (``--output benchmarks/results/avx2/goals.json``, and theirs there, too).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import llama
import torch
from common import RESULTS, Rows, in_own_process, table
from speed import prefill_once
from together import filled, seconds_together

from everlong.attention import LMInfinite, attach
from everlong.evaluation.machine_speed import measure_speed
from everlong.evaluation.speed import decode_seconds, fill, random_ids
from everlong.evaluation.speed_report import SpeedPlan
from everlong.evaluation.streams import open_stream
from everlong.models.catalogue import CATALOGUE
from everlong.models.loading import load_model
from everlong.models.packing import pack
from everlong.models.store import Store

WAITING, STEPS, METHODS = "spin briefly", 20, ("stock", "ours")
GOALS = {1024: 4, 8192: 8, 32768: 25}
CONTEXT = 1024  # tokens, of a decode step beside llama.cpp
TOGETHER, WINDOWS_TOGETHER = 8, (256, 1024)  # streams that write together, and their windows


def main() -> None:
    """Measure what is missing, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--weights", choices=("int4", "int8"), default="int4")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--depths", type=int, nargs="+", default=list(GOALS))
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 1024])
    parser.add_argument(
        "--longest", type=int, default=8192, help="llama.cpp's: what the model was trained on"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--gguf", type=Path, help="for llama.cpp (default: where a catalogue model keeps it)")
    parser.add_argument("--llama", type=Path, default=llama.ENVIRONMENT, help="llama.cpp's environment")
    parser.add_argument("--build-llama", action="store_true", help="build that environment first")
    parser.add_argument("--output", type=Path, default=RESULTS / "goals.json")
    parser.add_argument("--once", choices=ONCE, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        torch.set_num_threads(options.threads)
        print(json.dumps(ONCE[options.once](options)))
        return
    if options.build_llama:
        llama.build(options.llama)

    kept = ("model", "weights", "window", "depths", "prompts", "longest", "repeats", "threads")
    setting = {key: getattr(options, key) for key in kept}
    rows = Rows(options.output, setting)

    def once(part: str) -> Any:
        words: list[object] = []
        for key in ("model", "weights", "window", "repeats", "threads", "depths", "prompts"):
            value = getattr(options, key)
            words += [f"--{key}", *(value if isinstance(value, list) else [value])]
        return in_own_process(__file__, *words, "--once", part, waiting=WAITING)

    found: dict[str, Any] = {"llama.cpp": rows.rows.get("llama.cpp")}
    found["beside llama.cpp"] = rows.get("beside llama.cpp", lambda: once("beside"))
    gguf = options.gguf or gguf_of(options.model)
    why = llama.missing(options.llama) if gguf else f"there is no GGUF file of {options.model}: see --gguf"
    if why is None and not found["llama.cpp"]:
        found["llama.cpp"] = rows.get("llama.cpp", lambda: their_speeds(options, gguf))
    found["speed"] = rows.get("speed", lambda: once("speed"))
    found["together"] = rows.get("together, recorded", lambda: once("together"))
    for method in METHODS:
        found[f"whole {method}"] = rows.get(f"whole {method}", lambda m=method: once(f"whole {m}"))
    rows.write_table("Goals of speed, and what was reached", page(options, found, bounded(options), why))


def gguf_of(model: str) -> Path | None:
    """Return the GGUF file that the catalogue keeps of `model`, if it is such a model and is here."""
    if model not in CATALOGUE:
        return None
    path = Store().gguf_path(model)
    return path if path.exists() else None


def their_speeds(options: Any, gguf: Any) -> Any:
    """Measure llama.cpp on our prompts, and on the longest that it takes."""
    return llama.speeds(
        options.llama,
        gguf,
        threads=options.threads,
        repeats=options.repeats,
        prompts=[*options.prompts, options.longest],
    )


def at_depths(options: Any) -> Any:
    """Measure what ``everlong bench speed`` does, in this process."""
    plan = SpeedPlan(tuple(options.depths), options.repeats)
    policy = LMInfinite(window=options.window)
    *_, report = measure_speed(load_model(options.model), policy, plan, weights=options.weights)
    if not report.work.is_complete:
        raise SystemExit(f"{options.model} has experts, whose products are not counted: use another model")
    return report.as_json()


def beside(options: Any) -> Any:
    """Measure prompts on an empty context, and steps in full windows, in this process."""
    model = load_model(options.model).model
    head = model.get_output_embeddings()
    pack(model, options.weights)
    decode, prefill = {}, {}
    for window in (CONTEXT, options.window):
        with open_stream(model, LMInfinite(window=window)) as stream:
            fill(stream, window)
            ids = random_ids(stream.decoder, STEPS)
            decode_seconds(stream, ids, head)  # warms up
            steps = [median(decode_seconds(stream, ids, head)) for _ in range(options.repeats)]
        decode[window] = 1000 * median(steps)
    for prompt in options.prompts:
        times = []
        for _ in range(options.repeats):
            with open_stream(model, LMInfinite(window=options.window)) as stream:
                ids = random_ids(stream.decoder, prompt)
                started = time.perf_counter()
                stream.read(ids)
                times.append(time.perf_counter() - started)
        prefill[prompt] = prompt / median(times)
    return {"decode_ms": decode, "prefill": prefill}


def together(options: Any) -> Any:
    """Measure a step of one stream and of several that write together, in this process, by their windows."""
    model = load_model(options.model).model
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    pack(model, options.weights)
    found: dict[int, list[float]] = {}
    for window in WINDOWS_TOGETHER:
        with attach(model, LMInfinite(window=window)) as handle, torch.inference_mode():
            caches = filled(handle, decoder, window, TOGETHER)
            found[window] = []
            for rows in (1, TOGETHER):
                cache, count = handle.batch(caches[:rows]).cache, (options.repeats + 2) * STEPS
                steps = seconds_together(handle, cache, head, rows, count)
                found[window].append(1000 * median(steps[2 * STEPS :]))  # the first pack, and are recorded
    return found


ONCE: dict[str, Callable[[Any], Any]] = {
    "speed": at_depths,
    "beside": beside,
    "together": together,
    **{f"whole {m}": lambda o, m=m: prefill_once(o.model, o.window, m, max(o.depths)) for m in METHODS},
}
"""What is measured in a process of its own."""


def bounded(options: Any) -> Any:
    """Return what `bounded.py` measured, if that lies beside our own output."""
    path = options.output.with_name("bounded.json")
    return json.loads(path.read_text()) if path.exists() else None


def page(options: Any, found: dict[str, Any], bounded: Any, why: str | None) -> list[str]:
    """Lay the page out: the goals, llama.cpp beside us, and where a step's and a chunk's time goes."""
    return [
        f"{options.model}, float32, our weights {options.weights} for writing; LMInfinite(window="
        f"{options.window}), the window full; {options.threads} threads that {WAITING}, whatever the line "
        f"above says. Medians of {options.repeats}, whole prefills once.",
        "",
        *table(["what", "against", "goal", "reached"], goals(options, found, bounded, why)),
        "",
        "Beside llama.cpp, same GGUF file, same threads:",
        "",
        *table(
            ["", f"writing at {CONTEXT:,} tokens, ms/token", *prompt_headings(options, found["llama.cpp"])],
            beside_rows(options, found, why),
        ),
        "",
        "Where the time goes. Kernels alone: every product, attention to the window and the head, called "
        "from Python one after another, which a recorded step does without; bus: the weights and the window, "
        "read at the rate at which a large buffer is summed up. The matrix rate is that of a large float32 "
        f"product; stock's and our chunks of {found['speed']['plan']['chunk']} tokens are counted by what "
        "their definitions need.",
        "",
        *table(
            [
                "context",
                "writing, ms: stock",
                "ours",
                "kernels alone",
                "products",
                "window",
                "head",
                "at the bus's rate",
                "reading, of the matrix rate: stock",
                "ours",
                "matrix rate, GFLOP/s",
                "bus, GB/s",
            ],
            [time_cells(row) for row in found["speed"]["rows"]],
        ),
    ]


def goals(options: Any, found: dict[str, Any], bounded: Any, why: str | None) -> list[list[str]]:
    """Each goal with what was reached; ratios above 1 are in our favour where the goal is a least one."""
    rows, ours = found["speed"]["rows"], found["beside llama.cpp"]
    theirs, deepest = found["llama.cpp"], max(options.depths)
    row = max(rows, key=lambda row: row["depth"])
    wholes = [found[f"whole {method}"]["seconds"] for method in METHODS]
    at = " / ".join(f"{depth:,}" for depth in options.depths)
    least = " / ".join(f"{GOALS[depth]}x" if depth in GOALS else "none" for depth in options.depths)
    by_depth = {row["depth"]: row for row in rows}
    decode = [f"{by_depth[depth]['ratios']['decode']:.1f}x" for depth in options.depths]
    step, window = ours["decode_ms"], str(options.window)
    skipped = f"not measured: {why}"
    return [
        [
            f"writing, one session, at {CONTEXT:,}",
            "llama.cpp, same file, same threads",
            "≥ 1.0x",
            f"{theirs['decode_ms'] / step[str(CONTEXT)]:.2f}x; in a full window of {options.window:,}: "
            f"{theirs['decode_ms'] / step[window]:.2f}x"
            if theirs
            else skipped,
        ],
        [f"writing, one session, at {at}", "stock transformers", f"≥ {least}", " / ".join(decode)],
        [
            f"writing, {TOGETHER} sessions together, windows of "
            + " / ".join(f"{int(window):,}" for window in found["together"]),
            "one session",
            "≥ 4x",
            " / ".join(f"{TOGETHER * one / all_:.1f}x" for one, all_ in found["together"].values()),
        ],
        [
            f"reading {deepest:,} tokens",
            "stock transformers",
            "≥ 6x",
            f"{wholes[0] / wholes[1]:.1f}x ({wholes[0]:.0f} s / {wholes[1]:.0f} s)",
        ],
        [
            f"reading {deepest:,} tokens",
            "llama.cpp on its largest window",
            "≥ 2x",
            longest_ratio(theirs, deepest / wholes[1]) if theirs else skipped,
        ],
        [
            "reading: the model's products and the attention the definition needs",
            "measured matrix rate",
            "≥ 85 %",
            f"{100 * row['ours']['prefill_share']:.0f} %",
        ],
        [
            "a step of writing",
            "its kernels alone",
            "≤ 1.25x",
            f"{row['step_to_floor']:.2f}x as Python calls them{within_a_step(options)} (memory bus: "
            f"{median(each['ours']['decode_ms'] / each['bus_ms'] for each in rows):.1f}x)",
        ],
        [
            "cost of a token, the 1,000,000th",
            "the 10,000th",
            "≤ 1.02x",
            million(bounded),
        ],
        [
            "state of one session",
            f"stock cache at {deepest:,}",
            "≤ 1/15",
            f"1/{row['ratios']['bytes']:.1f}",
        ],
    ]


def within_a_step(options: Any) -> str:
    """Say how much longer a step is than its kernels take within it, by another script's measurement."""
    path, key = options.output.with_name("profile_step.json"), f"{options.weights}, {options.window}"
    saved = json.loads(path.read_text()) if path.exists() else {"setting": None, "rows": {}}
    if saved["setting"] != {"model": options.model} or key not in saved["rows"]:
        return ""
    ratio = 1 / (1 - saved["rows"][key]["besides"])
    return f", {ratio:.2f}x of what they take within it, [profile_step.md](profile_step.md)"


def longest_ratio(theirs: Any, rate: float) -> str:
    """Compare our tokens per second with llama.cpp's on its longest prompt."""
    longest = max(theirs["prefill"], key=int)
    other = theirs["prefill"][longest]
    return f"{rate / other:.1f}x ({rate:.0f} / {other:.0f} tokens/s, its {int(longest):,} tokens)"


def million(saved: Any) -> str:
    """Say what the last of many tokens cost, by another script's measurement."""
    if saved is None:
        return "not measured: run bounded.py"
    first, last = saved["rows"]["LM-Infinite"]["milliseconds"]
    tokens, settled = saved["setting"]["tokens"], saved["setting"]["settled"]
    where = f"the {tokens:,}th against the {settled:,}th, [bounded.md](bounded.md)"
    return f"{last / first:.2f}x ({where})"


def prompt_headings(options: Any, theirs: Any) -> list[str]:
    prompts = [*options.prompts, *([max(map(int, theirs["prefill"]))] if theirs else [])]
    return [f"reading a prompt of {prompt:,}, tokens/s" for prompt in prompts]


def beside_rows(options: Any, found: dict[str, Any], why: str | None) -> list[list[str]]:
    """Their row, and one for each of our windows."""
    ours, theirs = found["beside llama.cpp"], found["llama.cpp"]
    longest = [""] if theirs else []
    rows = []
    if theirs:
        rates = [
            f"{rate:.0f}" for _, rate in sorted(theirs["prefill"].items(), key=lambda each: int(each[0]))
        ]
        rows.append([f"llama.cpp ({theirs['version']})", f"{theirs['decode_ms']:.1f}", *rates])
    else:
        rows.append([f"llama.cpp: not measured, {why}", "", *("" for _ in options.prompts)])
    for window, milliseconds in ours["decode_ms"].items():
        is_ours = int(window) == options.window
        rates = [f"{ours['prefill'][str(prompt)]:.0f}" if is_ours else "" for prompt in options.prompts]
        rows.append([f"ours, a full window of {int(window):,}", f"{milliseconds:.1f}", *rates, *longest])
    return rows


def time_cells(row: Any) -> list[str]:
    """One depth's cells."""
    floor = row["floor"]
    parts = [floor[f"{part}_ms"] for part in ("products", "window", "head")]
    return [
        f"{row['depth']:,}",
        *(f"{row[side]['decode_ms']:.1f}" for side in ("stock", "ours")),
        f"{sum(parts):.1f}",
        *(f"{part:.1f}" for part in parts),
        f"{row['bus_ms']:.1f}",
        *(f"{100 * row[side]['prefill_share']:.0f} %" for side in ("stock", "ours")),
        f"{row['matrix_flops'] / 1e9:.0f}",
        f"{row['bandwidth'] / 1e9:.1f}",
    ]


if __name__ == "__main__":
    main()
