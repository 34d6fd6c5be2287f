"""Writes the README's results from what the benchmark scripts measured: ``python docs/write_results.py``.

The tables in ``benchmarks/results/`` say more; a test holds that the README is what this script writes.
"""

from __future__ import annotations

import re
from statistics import median
from typing import Any

from saved_results import RESULTS, ROOT, load, source  # puts the scripts on the path

# isort: split
from common import table
from default_writing import WAYS as DEFAULTS
from memory_results import beside_the_whole, grounded, memories, passing, skills
from passkey import WAYS, counted, found_in
from real_text import excess_of, number
from weights import cells

from everlong.evaluation.finding import Found, FoundShare, shares
from everlong.evaluation.needles import Passkey
from everlong.models.files import human_bytes

BEGIN, END = "<!-- results: written by docs/write_results.py -->", "<!-- end of results -->"

SHOWN = {
    "stock": "stock",
    "LM-Infinite, 2048": "LM-Infinite, window 2,048",
    "LM-Infinite, 4096": "LM-Infinite, window 4,096",
    "StreamingLLM, 2048": "StreamingLLM, window 2,048",
    "window without sinks, 2048": "ablation: window without sinks",
    "Λ mask without ceiling, 2048": "ablation: Λ mask without ceiling",
}
FAR = ("passkey_far", "passkey_farther")
PROCESSORS = {"goals": "AVX-512", "avx2/goals": "AVX2"}
METHODS = ("methods_smollm2-135m", "methods_gemma-3-270m")
BASELINES = ("stock", "last", "first-and-last")
POSITIONS = (2048, 8192, 12288, 16384, 24576, 32768)


def main() -> None:
    """Write the section into the README."""
    readme = ROOT / "README.md"
    readme.write_text(with_results(readme.read_text()))


def with_results(readme: str) -> str:
    """Return the README's text with the section of results as it should be."""
    section = "\n".join(
        [
            BEGIN,
            "",
            *real_text(),
            "",
            *passkeys(),
            "",
            *far_passkeys(),
            "",
            *side_by_side(),
            "",
            *speed(),
            "",
            *recalling(),
            "",
            *writing(),
            "",
            *default_writing(),
            "",
            *goals(),
            "",
            *bounded(),
            "",
            *start_up(),
            "",
            *memories(),
            "",
            *passing(),
            "",
            *skills(),
            "",
            *grounded(),
            "",
            *beside_the_whole(),
            "",
            END,
        ]
    )
    return re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: section, readme, flags=re.DOTALL)


def real_text() -> list[str]:
    """Perplexity by position, and the excess over re-reading."""
    saved = load("real_text")
    setting, rows = saved["setting"], saved["rows"]
    shown = [
        [words, *(number(ppl) for stop, ppl, *_ in rows[key]["buckets"] if stop in POSITIONS)]
        for key, words in SHOWN.items()
    ]
    excess = {window: excess_of(rows, f"LM-Infinite, {window}", window) for window in (2048, 4096)}
    return [
        f"**Reading on.** Perplexity of {setting['model']} (trained on 8,192 tokens) on "
        f"*{setting['text'].title()}*, of the {setting['bucket']:,} tokens up to each position:",
        "",
        *table(["", *(f"{position:,}" for position in POSITIONS)], shown),
        "",
        "The honest upper reference is the stock model re-reading its last tokens from scratch before every",
        f"64. Beyond the training length, at {len(setting['anchors'])} places, LM-Infinite's surprisal is",
        "above it by "
        + " and ".join(
            f"{each.mean:.3f} nats a token at window {window:,} ({each.low:+.3f} to {each.high:+.3f}, 95 %)"
            for window, each in excess.items()
        )
        + ".",
        source("real_text", saved),
    ]


def passkeys() -> list[str]:
    """Passkeys in Python's sources, found by the ways to read."""
    saved = load("passkey_library")
    setting = saved["setting"]
    found = told_of(7, saved)
    length, samples = found[0].length, setting["samples"]
    shown = [
        [
            share.way,
            f"{100 * share.found.mean:.0f} ({100 * share.found.low:.0f} to {100 * share.found.high:.0f})",
            f"{100 * share.told.mean:.0f}",
        ]
        for share in sorted(found, key=lambda each: list(WAYS).index(each.way))
    ]
    return [
        f"**Finding again.** A passkey of 7 digits in {length:,} tokens of Python's own "
        f'sources, asked "{setting["question"]}" at the end; {setting["model"]}, a window of',
        f"{setting['window']:,} tokens. `last` and `first-and-last` are the stock model, which reads a part "
        f"of the text. Of {samples} texts, the passkey ever deeper; intervals of 95 %:",
        "",
        *table(["", "found, percent", "digits told before the first mistake"], shown),
        "",
        source("passkey_library", saved, "passkey"),
    ]


def far_passkeys() -> list[str]:
    """Passkeys of 64 digits, ever farther away."""
    every = [load(name) for name in FAR]
    found = {(share.way, share.length): share for saved in every for share in told_of(64, saved)}
    lengths = sorted({length for _, length in found})
    ways = sorted({way for way, _ in found}, key=list(WAYS).index)
    shown = [[way, *(of_texts(found.get((way, length))) for length in lengths)] for way in ways]
    setting = every[0]["setting"]
    return [
        "A passkey of 64 digits in Python's own sources, asked for in the same words; "
        f"{setting['model']}, which was trained on 8,192 tokens, and a window of {setting['window']:,}. "
        "Texts whose passkey was told whole:",
        "",
        *table(["", *(f"{length:,} tokens" for length in lengths)], shown),
        "",
        *(source(name, saved, "passkey") for name, saved in zip(FAR, every, strict=True)),
    ]


def told_of(digits: int, saved: dict[str, Any]) -> list[FoundShare]:
    """Return what was found of passkeys of so many digits."""
    label = Passkey(digits=digits, question=saved["setting"]["question"]).label
    return [share for share in shares(found_in(saved["rows"])) if share.task == label]


def of_texts(share: FoundShare | None) -> str:
    """Say of how many texts all was told."""
    return "" if share is None else counted(share)


def side_by_side() -> list[str]:
    """Every method, in the texts that all have read."""
    every = [load(name) for name in METHODS]
    columns: dict[str, dict[str, FoundShare]] = {}
    for saved in every:
        for share in shares([Found.restored(row) for row in saved["rows"].values()]):
            column = f"{saved['setting']['model']}: {share.task}, {share.length:,} tokens"
            columns.setdefault(column, {})[share.way] = share
    ways = sorted({way for column in columns.values() for way in column}, key=_baselines_first)
    shown = [[way, *(f"{counted(of[way])}" if way in of else "" for of in columns.values())] for way in ways]
    return [
        "**Side by side.** Every method as `everlong bench methods` measures it, those that have a window "
        "with one of 2,048 tokens: of how many texts all was told",
        "that was asked for. So few texts tell methods that find from those that do not, no more. `snap-kv` "
        "and `pyramid-kv` knew the question; `linear` and `yarn`",
        "stretch positions four times, which these models do not need up to the lengths they were trained "
        "on, 8,192 tokens and gemma 32,768. Where nothing stands, it was not measured.",
        "",
        *table(["", *columns], shown),
        "",
        *(source(name, saved, "methods") for name, saved in zip(METHODS, every, strict=True)),
    ]


def _baselines_first(way: str) -> tuple[int, str]:
    return (BASELINES.index(way) if way in BASELINES else len(BASELINES)), way


def speed() -> list[str]:
    """Prefill, decode and state against stock transformers."""
    saved = load("speed")
    rows, window = saved["rows"], saved["setting"]["window"]
    shown = []
    for depth in (8192, 16384, 32768):
        stock, ours = rows[f"at {depth}"]["stock"], rows[f"at {depth}"]["ours"]
        held = rows[f"at {depth}"]["bytes"]
        whole = [rows[f"whole {method} {depth}"] for method in ("stock", "ours")]
        shown.append(
            [
                f"{depth:,}",
                ratio(stock["decode_ms"], ours["decode_ms"], "{:.0f} ms"),
                ratio(whole[0]["seconds"], whole[1]["seconds"], "{:.0f} s"),
                ratio(held[0] / 2**20, held[1] / 2**20, "{:.0f} MiB"),
                ratio(whole[0]["peak"] / 2**20, whole[1]["peak"] / 2**20, "{:.0f} MiB"),
            ]
        )
    packed = rows["packed at 32768"]
    packed_decode = ratio(packed["stock"]["decode_ms"], packed["ours"]["decode_ms"], "{:.0f} ms")
    shown.append(["32,768, weights packed in 4 bits", packed_decode, "", "", ""])
    return [
        f"**Speed and memory.** LM-Infinite with a window of {window:,} against stock transformers (SDPA, "
        "`DynamicCache`, the same chunked",
        "prefill), SmolLM2-135M, float weights but for the last line: stock's figure, then ours, then the "
        "ratio.",
        "",
        *table(
            ["context", "decode a token", "prefill of it all", "state held", "peak memory above the weights"],
            shown,
        ),
        "",
        source("speed", saved),
    ]


def recalling() -> list[str]:
    """What it takes to recall, beside forgetting."""
    saved = load("reading_rate")
    setting, rows = saved["setting"], saved["rows"]
    base = next(iter(rows.values()))["rates"][-1]
    shown = [
        [
            name,
            f"{row['rates'][-1]:.0f} ({row['rates'][-1] / base:.0%})",
            f"{row['single_ms']:.0f} ms",
            human_bytes(row["bytes"]["window"]),
            human_bytes(row["bytes"].get("ram", 0)) if row["bytes"].get("ram") else "",
        ]
        for name, row in rows.items()
    ]
    return [
        f"**What recalling takes.** {setting['model']}, a window of {setting['window']:,} tokens, after "
        f"{max(setting['lengths']):,}, float weights, by the processor's time:",
        "",
        *table(["", "tokens/s, reading", "a token that comes alone", "window", "tier and its keys"], shown),
        "",
        source("reading_rate", saved),
    ]


def writing() -> list[str]:
    """Packed weights."""
    saved, cost = load("writing"), load("weights")
    rows, base = saved["rows"], cost["rows"]["float"]["blocks"]
    shown = []
    for weights in ("stock", "float", "int8", "int4"):
        milliseconds = rows[f"{weights}, spin briefly"]
        change = ""
        if weights in ("int8", "int4"):
            change = cells(cost["rows"][weights], base, weights)[1]
        name = "stock transformers" if weights == "stock" else f'`weights="{weights}"`'
        shown.append([name, f"{milliseconds:.1f} ms", f"{1000 / milliseconds:.0f}", change])
    return [
        "**Writing.** With weights packed for it (the default on CPUs, where it pays; reading uses the float "
        "ones),",
        f"a token under LM-Infinite, at a full window of {saved['setting']['window']:,}, threads as the "
        "command line sets them (measured before there were compiled kernels):",
        "",
        *table(["", "a token", "tokens/s", "perplexity"], shown),
        "",
        source("writing", saved),
        source("weights", cost),
    ]


def default_writing() -> list[str]:
    """What a token takes as a session writes it by default."""
    saved = load("avx2/default_writing")
    stock, without, compiled = DEFAULTS.values()
    depths = sorted({int(name.split(" tokens")[0].replace(",", "")) for name in saved["rows"]})
    shown = []
    for depth in depths:
        row = {way: saved["rows"][f"{depth:,} tokens, {way}"]["ms"] for way in DEFAULTS.values()}
        times = f"{row[stock] / row[compiled]:.1f}x"
        shown.append([f"{depth:,}", *(f"{milliseconds:.0f} ms" for milliseconds in row.values()), times])
    return [
        f"**Writing by default.** {saved['setting']['model']} as `load()` has it, with the weights and the "
        "policy that it chooses, by how many",
        "tokens there are already; up to the training length nothing has left the window, and beyond that it "
        "recalls.",
        "With Numba installed (`everlong[cpu]`), and without:",
        "",
        *table(["tokens before", stock, "without Numba", "with Numba", "stock / with Numba"], shown),
        "",
        source("avx2/default_writing", saved, "default_writing"),
    ]


def goals() -> list[str]:
    """What speed is to reach, and what it has reached, on processors with and without AVX-512."""
    pages = [reached(name) for name in PROCESSORS]
    heading, lines = pages[0][0], zip(*(page[1:] for page in pages), strict=True)
    return [
        "**Goals of speed**, LM-Infinite in 4 bits and a window of 2,048, threads as the command line sets "
        "them; on two machines of 2 cores each. The one without AVX-512 reads memory and multiplies about "
        "half as fast; the other was measured before there were compiled kernels, and its sessions together, "
        "and the one that they are held against, in steps that were not recorded. With AVX2 the 32,768 "
        "tokens were read in an earlier run than the rest, of the same day, and sessions together "
        "measured a day later.",
        "",
        *table(
            [*heading[:3], *(f"{heading[3]}, {name}" for name in PROCESSORS.values())],
            [[*line[0][:3], *(cells[3] for cells in line)] for line in lines],
        ),
        "",
        "Where a step's time goes: [with AVX-512](benchmarks/results/profile_step.md), "
        "[with AVX2](benchmarks/results/avx2/profile_step.md); where that of",
        "reading goes, [with AVX2](benchmarks/results/avx2/profile_read.md). What guessing ahead saves: "
        "[speculation.md](benchmarks/results/speculation.md).",
        *(source(name, load(name), "goals") for name in PROCESSORS),
    ]


def reached(name: str) -> list[list[str]]:
    """Return the cells of a page of goals, its links as seen from the README; the headings first."""
    path = RESULTS / f"{name}.md"
    lines = path.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    heading, _, *rows = lines[start : lines.index("", start)]
    linked = (re.sub(r"\]\((\w+\.md)\)", rf"]({path.parent.relative_to(ROOT)}/\1)", row) for row in rows)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (heading, *linked)]


def bounded() -> list[str]:
    """A million tokens."""
    saved = load("bounded")
    row, setting = saved["rows"]["LM-Infinite"], saved["setting"]
    growth = row["resident"][1] / row["resident"][0] - 1
    slower = row["milliseconds"][1] / row["milliseconds"][0] - 1
    return [
        f"**Bounded.** Reading {setting['tokens']:,} tokens under LM-Infinite, with a tiny model, resident "
        f"memory grew by {growth:.2%} after the first {setting['settled']:,},",
        f"and the last chunks took {abs(slower):.1%} {'more' if slower > 0 else 'less'} time than the first.",
        source("bounded", saved),
    ]


def start_up() -> list[str]:
    """From the start of a process to a model that is ready."""
    saved, other = load("start_up"), load("avx2/start_up")
    rows, model = saved["rows"], saved["setting"]["model"]
    ready, first, helped = (
        median(rows[key])
        for key in ("load, auto", "everlong generate, to its first token", "everlong --help")
    )
    slow, alone, class_alone = (
        median(other["rows"][key])
        for key in (
            "load, auto",
            "the same model by transformers alone",
            "transformers' class of models, imported",
        )
    )
    return [
        f"**Start-up.** From the start of a process, {model} is ready after {ready:.1f} s, "
        "`everlong generate` writes",
        f"its first token after {first:.1f} s, and `everlong --help` is done after {helped:.1f} s.",
        "On a slower machine, [with AVX2](benchmarks/results/avx2/start_up.md),",
        f"it is ready after {slow:.1f} s,",
        f"where transformers alone takes {alone:.1f} s for the same model: importing the class that loads it",
        f"takes {class_alone:.1f} s there.",
        source("start_up", saved),
    ]


def ratio(stock: float, ours: float, form: str) -> str:
    """Write both figures and how many times better ours is."""
    return f"{form.format(stock)} / {form.format(ours)}: **{stock / ours:.1f}x**"


if __name__ == "__main__":
    main()
