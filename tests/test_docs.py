"""The documentation says what is: its Python runs, its links lead somewhere, its tables agree with the code."""

import ast
import functools
import importlib.util
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
import tests.tiny as tiny
from everlong.attention import POLICIES, FullAttention, LMInfinite, StreamingLLM, attach
from everlong.cli.app import build_app
from everlong.errors import EverlongError
from everlong.models import refusals

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
README = PAGES["README.md"].read_text()


def fences(page, language):
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page].read_text(), re.MULTILINE | re.DOTALL)


def code_spans(text):
    return set(re.findall(r"`([^`\n]+)`", text))


def table_rows(text, heading):
    """The rows of the first table below a heading, cell by cell, without its head."""
    after = text.split(f"\n{heading}\n", 1)[1]
    lines = [line for line in after[: (after + "\n## ").index("\n## ")].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def load_file(path, monkeypatch):
    """Import a file that stands outside the package; what it registers is forgotten after the test."""
    monkeypatch.setattr(POLICIES, "_entries", dict(POLICIES._entries))
    spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


# --- the Python on the pages ------------------------------------------------------------------------


@pytest.fixture
def little_world(monkeypatch, tmp_path):
    """Names that pages use without saying where from; models of any name are a tiny one that reads bytes."""
    model, tokenizer = tiny.byte_llama()
    load = everlong.load

    def load_tiny(source, attention=None, **options):
        given = {key: value for key, value in options.items() if key not in ("device", "dtype", "revision")}
        if isinstance(source, str):
            return load(model, attention, tokenizer=tokenizer, **given)
        return load(source, attention, **options)

    monkeypatch.setattr(everlong, "load", load_tiny)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    monkeypatch.setattr(POLICIES, "_entries", dict(POLICIES._entries))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    for folder in ("docs", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "novel.txt").write_text("It was a dark night; the rain fell in torrents.\n" * 20)
    modules = set(sys.modules)
    yield {"model": model, "inputs": dict(tokenizer("Call me Ishmael.", return_tensors="pt"))}
    for name in set(sys.modules) - modules:
        if not name.startswith(("everlong", "transformers", "torch")):
            del sys.modules[name]


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


@pytest.mark.parametrize("words", shell_lines())
def test_commands_and_their_options_exist(words):
    program, *arguments = words
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "everlong":
        command = typer.main.get_command(build_app()).commands[arguments[0]]
        options = {
            option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        assert {word.split("=")[0] for word in arguments if word.startswith("-") and word != "-"} <= options
        asked = [
            arguments[at + 1] for at, word in enumerate(arguments) if word in ("--attention", "--methods")
        ]
        assert all(name in POLICIES for names in asked for name in names.split(","))
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
    text = re.sub(r"^```.*?^```", "", PAGES[page].read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
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
        kind = POLICIES[next(iter(code_spans(name)))]
        assert (call.func.id if isinstance(call, ast.Call) else call.id) == kind.__name__
        options = {option.arg: ast.literal_eval(option.value) for option in getattr(call, "keywords", [])}
        told[POLICIES.name_of(kind), tuple(options)] = forgets != "no"
        assert kind(**options).forgets == (forgets != "no"), name
    ours = {name for name in POLICIES if POLICIES[name].__module__.startswith("everlong.")}
    assert {name for name, _ in told} == ours
    assert told["lm-infinite", ()] and not told["lm-infinite", ("top_k",)]


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


def test_the_changelog_knows_this_version():
    assert f"\n## {everlong.__version__}\n" in PAGES["CHANGELOG.md"].read_text()


def test_the_numbers_about_memory_are_what_a_cache_of_that_shape_holds():
    text = PAGES["docs/limits.md"].read_text()
    layers, heads, size = map(
        int, re.search(r"\((\d+) layers,\s+(\d+) key-value heads, size (\d+)\)", text).groups()
    )
    model = tiny.build(
        "llama", num_hidden_layers=layers, num_key_value_heads=heads, num_attention_heads=heads, head_dim=size
    )
    with attach(model, LMInfinite(window=2048, sinks=0)) as handle, torch.no_grad():
        cache = handle.new_cache()
        handle.decoder(tiny.random_ids(1, 2048), past_key_values=cache)
        held = cache.bytes()["window"]
    assert f"{held // 2048:,} bytes a token" in text
    assert f"{held / 1e6:.0f} MB at `window=2048`, {4 * held / 1e6:.0f} MB at 8192" in text
    assert f"{held / 2048 * 1e6 / 1e9:.0f} GB after a million tokens" in text


# --- the API page -----------------------------------------------------------------------------------


def documented_signatures():
    for signature in re.findall(r"^#{3,4} `([^`]+\(.*\))`", PAGES["docs/api.md"].read_text(), re.MULTILINE):
        yield pytest.param(*re.fullmatch(r"([\w.]+)(\(.*\))", signature).groups(), id=signature)


@pytest.mark.parametrize("name, written", documented_signatures())
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
    words = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`]+`", text))))
    assert public | errors <= words


@pytest.mark.parametrize("kind", ["Session", "LLM", "StreamCache", "Attachment"])
def test_the_api_page_names_every_public_method(kind):
    found = getattr(everlong, kind)
    text = PAGES["docs/api.md"].read_text()
    own = [
        n
        for n, v in vars(found).items()
        if not n.startswith("_") and (callable(v) or isinstance(v, property))
    ]
    inherited = set(dir(transformers.Cache))
    missing = [name for name in own if name not in inherited and not re.search(rf"\b{name}\b", text)]
    assert not missing


# --- the pictures and the example -------------------------------------------------------------------

W, G = 14, 3
TOKENS = 40


def defined(policy):
    """Distances by docs/concepts.md, pair by pair; NaN: not seen."""
    table = torch.full((TOKENS, TOKENS), torch.nan, dtype=torch.float64)
    for i in range(TOKENS):
        for j in range(i + 1):
            if isinstance(policy, FullAttention):
                table[i, j] = i - j
            elif i - j < policy.window - policy.sinks or j < policy.sinks:
                far = i - j
                if isinstance(policy, StreamingLLM):
                    far = min(i, policy.window - 1) - j if j < policy.sinks else i - j
                elif policy.ceiling is not None:
                    far = min(far, policy.window - 1)
                table[i, j] = far
    return table


@pytest.fixture
def masks(monkeypatch):
    return load_file(ROOT / "docs" / "draw_masks.py", monkeypatch)


@pytest.mark.parametrize("chunks", [1, 7, TOKENS])
@pytest.mark.parametrize(
    "policy",
    [
        FullAttention(),
        LMInfinite(window=W, sinks=0),
        LMInfinite(window=W, sinks=G),
        LMInfinite(window=W, sinks=G, ceiling=None),
        StreamingLLM(window=W, sinks=G),
    ],
    ids=str,
)
def test_the_pictures_show_what_the_concepts_page_says(masks, policy, chunks):
    torch.testing.assert_close(masks.seen_distances(policy, chunks), defined(policy), equal_nan=True)


def test_the_picture_of_top_k_shows_k_middle_keys_at_half_a_window(masks):
    seen = masks.seen_distances(LMInfinite(window=W, sinks=G, top_k=2, top_k_layers=0), chunks=TOKENS)
    plain = defined(LMInfinite(window=W, sinks=G))
    extra = seen.isfinite() & plain.isnan()
    assert (seen[extra] == W // 2).all()
    middle = (torch.arange(TOKENS) - W + 1).clamp(0, 2)
    assert torch.equal(extra.sum(1), middle)
    torch.testing.assert_close(seen.masked_fill(extra, torch.nan), plain, equal_nan=True)


def test_the_pictures_are_drawn(masks, tmp_path):
    assert masks.draw(tmp_path).read_bytes()[:4] == b"\x89PNG"
    shown = {(type(policy), getattr(policy, "top_k", 0) > 0) for policy in masks.PANELS.values()}
    ours = {POLICIES[name] for name in POLICIES if POLICIES[name].__module__.startswith("everlong.")}
    assert {kind for kind, _ in shown} == ours and (LMInfinite, True) in shown


@pytest.fixture
def dilated(monkeypatch):
    return load_file(ROOT / "examples" / "my_policy.py", monkeypatch).Dilated


def test_the_example_policy_is_forty_lines():
    source = (ROOT / "examples" / "my_policy.py").read_text()
    (definition,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    assert definition.end_lineno - definition.lineno <= 44


@torch.no_grad()
def test_the_example_policy_is_lm_infinite_when_it_skips_nothing(dilated):
    model = tiny.build("llama")
    ids, mask = tiny.left_padded([60, 43])

    def logits(policy, chunk):
        with attach(model, policy) as handle:
            cache = handle.new_cache()
            pieces = [
                model(
                    ids[:, at : at + chunk], attention_mask=mask[:, : at + chunk], past_key_values=cache
                ).logits
                for at in range(0, ids.shape[1], chunk)
            ]
        return torch.cat(pieces, 1)[mask.bool()]

    expected = logits(LMInfinite(window=W, sinks=G), 60)
    for chunk in (1, 7, 60):
        everything = logits(dilated(window=W, sinks=G, stride=1), chunk)
        torch.testing.assert_close(everything, expected, atol=1e-4, rtol=1e-4)
    thinned = logits(dilated(window=W, sinks=G, near=4, stride=3), 60)
    assert not torch.allclose(thinned, expected, atol=1e-2)


def test_the_example_policy_sees_what_its_docstring_says(dilated, masks):
    policy = dilated(window=W, sinks=G, near=4, stride=3)
    distances = defined(LMInfinite(window=W, sinks=G))
    i, j = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)
    distances = distances.masked_fill((j >= G) & (i - j >= 4) & (j % 3 != 0), torch.nan)
    for chunks in (1, 7, TOKENS):
        torch.testing.assert_close(masks.seen_distances(policy, chunks), distances, equal_nan=True)
