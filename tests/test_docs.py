"""The pages say what is: their Python runs, their links lead somewhere, their lists agree with the code."""

import argparse
import ast
import functools
import importlib
import inspect
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import transformers
import typer.main

import everlong
import everlong.errors
import tests.tiny as tiny
from everlong.attention import POLICIES, LMInfinite, attach
from everlong.cli.app import build_app
from everlong.errors import EverlongError
from everlong.evaluation.comparison import STOCK
from everlong.models import refusals
from everlong.reading import READING_METHODS

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
README = PAGES["README.md"].read_text()


def fences(page, language):
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page].read_text(), re.MULTILINE | re.DOTALL)


def without_fences(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def code_spans(text):
    return set(re.findall(r"`([^`\n]+)`", without_fences(text)))


def table_rows(text, heading):
    """The rows of the first table below a heading, cell by cell, without its head."""
    after = text.split(f"\n{heading}\n", 1)[1]
    lines = [line for line in after[: (after + "\n## ").index("\n## ")].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


# --- the Python on the pages ------------------------------------------------------------------------


@pytest.fixture
def little_world(monkeypatch, tmp_path):
    """Names that pages use without saying where from; models of any name are a tiny one that reads bytes."""
    load, tokenizer = everlong.load, tiny.byte_tokenizer()

    def load_tiny(source, attention=None, **options):
        given = {key: value for key, value in options.items() if key not in ("device", "dtype", "revision")}
        if isinstance(source, str):
            model, _ = tiny.byte_llama(max_position_embeddings=2048)
            return load(model, attention, tokenizer=tokenizer, **given)
        return load(source, attention, **options)

    monkeypatch.setattr(everlong, "load", load_tiny)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_: tiny.byte_llama()[0])
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_: tokenizer)
    monkeypatch.setattr(POLICIES, "_entries", dict(POLICIES._entries))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    for folder in ("docs", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "novel.txt").write_text("It was a dark night; the rain fell in torrents.\n" * 20)
    # What the README reads would be a hundred thousand tokens here.
    monkeypatch.setattr(argparse, "__file__", str(tmp_path / "novel.txt"))
    inputs = tokenizer("Call me Ishmael.", return_tensors="pt")
    yield {"model": tiny.byte_llama()[0], "inputs": inputs}
    for name in ("draw_masks", "my_policy"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("page", [page for page in PAGES if fences(page, "python")])
def test_the_python_of_a_page_runs_from_top_to_bottom(page, little_world):
    for block in fences(page, "python"):
        exec(compile(block, page, "exec"), little_world)


def test_the_readmes_example_has_about_ten_lines():
    assert len(fences("README.md", "python")[0].strip().splitlines()) <= 12


# --- the commands -----------------------------------------------------------------------------------


def shell_lines():
    for page in PAGES:
        for block in [*fences(page, "sh"), *fences(page, "bash")]:
            for line in block.splitlines():
                if words := shlex.split(line, comments=True):
                    yield pytest.param(words, id=f"{page}: {line}")


@pytest.mark.parametrize("words", list(shell_lines()))
def test_commands_and_their_options_exist(words):
    program, *arguments = words
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "everlong":
        command = typer.main.get_command(build_app()).commands[arguments[0]]
        if hasattr(command, "commands"):
            command = command.commands[arguments[1]]
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word.split("=")[0] for word in arguments if word.startswith("-") and word != "-"} <= options
        asked = [
            arguments[at + 1] for at, word in enumerate(arguments) if word in ("--attention", "--methods")
        ]
        if arguments[0] == "ask":
            assert {b for a, b in zip(arguments, arguments[1:], strict=False) if a == "--method"} <= set(
                READING_METHODS
            )
        known = {*POLICIES, STOCK}
        for name in (name for names in asked for name in names.split(",")):
            assert (ROOT / name).is_file() if name.endswith(".py") else name in known
    elif program == "python":
        assert (ROOT / arguments[0]).is_file()
    else:
        assert program in ("pip", "pytest", "git"), "a program nobody has checked"


# --- links and lists --------------------------------------------------------------------------------


def anchors(page):
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_fences(PAGES[page].read_text())):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        there = (PAGES[page].parent / name).resolve() if name else PAGES[page]
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_the_table_of_methods_is_the_registry():
    rows = table_rows(README, "## Methods")
    told = {}
    for name, written_class, *_, forgets, _ in rows:
        call = ast.parse(written_class.strip("`"), mode="eval").body
        kind = POLICIES[re.search(r"`([^`]+)`", name).group(1)]
        assert (call.func.id if isinstance(call, ast.Call) else call.id) == kind.__name__
        options = {option.arg: ast.literal_eval(option.value) for option in getattr(call, "keywords", [])}
        told[POLICIES.name_of(kind), tuple(options)] = forgets != "no"
        assert kind(**options).forgets == (forgets != "no"), name
    ours = {name for name in POLICIES if POLICIES[name].__module__.startswith("everlong.")}
    assert {name for name, _ in told} == ours
    assert told["lm-infinite", ()] and not told["lm-infinite", ("top_k",)]


def test_the_table_of_reading_methods_is_the_registry():
    rows = table_rows(README, "## Reading for one question")
    told = {re.search(r"`([^`]+)`", name).group(1): kind.strip("`") for name, kind, *_ in rows}
    assert told == {name: READING_METHODS[name].__name__ for name in READING_METHODS}


def test_the_file_tree_is_the_repository():
    (tree,) = fences("README.md", "text")
    named, folders = set(), []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        entry = line.split()[0]
        folders[depth:] = [entry.rstrip("/")]
        path = ROOT.joinpath(*folders)
        assert path.is_dir() if entry.endswith("/") else path.is_file(), line
        named.add(path)
    source = ROOT / "src" / "everlong"
    rooms = {path.parent for path in source.glob("*/*.py")} | set(source.glob("*.py")) - {
        source / "__main__.py"
    }
    assert rooms <= named


def test_the_limits_name_every_family_and_every_refusal():
    text = PAGES["docs/limits.md"].read_text()
    listed = text[text.index("## Models") : text.index("Refused with")]
    assert code_spans(listed) == set(tiny.FAMILIES)
    assert set(refusals._BY_TYPE) <= code_spans(text)
    assert f"{len(tiny.FAMILIES)} model families" in PAGES["CHANGELOG.md"].read_text()


def test_the_results_are_those_that_were_measured(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    write_results = importlib.import_module("write_results")
    for name, module in list(sys.modules.items()):  # scripts are for those who ask for them
        if (getattr(module, "__file__", None) or "").startswith((f"{ROOT}/docs/", f"{ROOT}/benchmarks/")):
            del sys.modules[name]
    assert write_results.BEGIN in README and write_results.with_results(README) == README


def test_the_changelog_knows_this_version():
    assert f"\n## {everlong.__version__}\n" in PAGES["CHANGELOG.md"].read_text()


def test_the_numbers_about_memory_are_what_a_cache_of_that_shape_holds():
    text = PAGES["docs/limits.md"].read_text()
    layers, heads, size = map(
        int, re.search(r"\((\d+) layers,\s+(\d+) key-value heads, size (\d+)\)", text).groups()
    )
    model = tiny.build("llama", num_hidden_layers=layers, num_key_value_heads=1, head_dim=heads * size)
    with attach(model, LMInfinite(window=2048, sinks=0)) as handle, torch.no_grad():
        cache = handle.new_cache()
        handle.decoder(tiny.random_ids(1, 2048), **tiny.cached(cache))
        held = cache.bytes()["window"]
    assert f"{held // 2048:,} bytes a token" in text
    assert f"{held / 1e6:.0f} MB at `window=2048`, {4 * held / 1e6:.0f} MB at 8192" in text
    assert f"{held / 2048 * 1e6 / 1e9:.0f} GB after a million tokens" in text


# --- the API page -----------------------------------------------------------------------------------


def documented_signatures():
    for signature in re.findall(r"^#{3,4} `([^`]+\(.*\))`", PAGES["docs/api.md"].read_text(), re.MULTILINE):
        yield pytest.param(*re.fullmatch(r"([\w.]+)(\(.*\))", signature).groups(), id=signature)


@pytest.mark.parametrize("name, written", list(documented_signatures()))
def test_signatures_on_the_api_page_are_the_codes(name, written):
    found = functools.reduce(getattr, name.removeprefix("everlong.").split("."), everlong)
    assert described(inspect.signature(found)) == described(ast.parse(f"def f{written}: ...").body[0].args)


def described(signature):
    """Names and defaults of the parameters, and which of them are for keywords only."""
    if isinstance(signature, ast.arguments):
        exec(f"def f({ast.unparse(signature)}): ...", namespace := {"Sampling": everlong.Sampling})
        signature = inspect.signature(namespace["f"])
    parameters = [p for p in signature.parameters.values() if p.name != "self"]
    return [(p.name, p.kind, p.default) for p in parameters]


def test_the_api_page_names_everything_public():
    text = PAGES["docs/api.md"].read_text()
    public = {name for name in everlong.__all__ if not name.startswith("_")}
    errors = {kind.__name__ for kind in EverlongError.__subclasses__()} | {
        "EverlongError",
        "UnknownNameError",
    }
    words = {word for span in code_spans(text) for word in re.findall(r"\w+", span)}
    assert public | errors <= words


@pytest.mark.parametrize("kind", ["Session", "LLM", "StreamCache", "Attachment", "MemoryStore", "Memory"])
def test_the_api_page_names_every_public_method(kind):
    found = getattr(everlong, kind)
    text = PAGES["docs/api.md"].read_text()
    own = [name for name in vars(found) if not name.startswith("_")]
    inherited = set(dir(transformers.Cache))
    missing = [name for name in own if name not in inherited and not re.search(rf"\b{name}\b", text)]
    assert not missing
