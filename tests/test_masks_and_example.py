"""The pictures of the masks show what is, and the documented policy of one's own does what it says."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import tests.tiny as tiny
from everlong.attention import (
    POLICIES,
    DualChunk,
    FullAttention,
    LinearScaling,
    LMInfinite,
    NTKScaling,
    SelfExtend,
    StreamingLLM,
    YaRN,
    attach,
)
from tests.reference.attention import ReferenceSpec, places

ROOT = Path(__file__).parents[1]
W, G = 14, 3
TOKENS = 40


def load_file(path, monkeypatch):
    """Import a file that stands outside the package; what it registers is forgotten after the test."""
    monkeypatch.setattr(POLICIES, "_entries", dict(POLICIES._entries))
    spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


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
    ours -= {LinearScaling, NTKScaling, YaRN}  # FullAttention's picture, in other units
    assert {kind for kind, _ in shown} == ours and (LMInfinite, True) in shown


@pytest.mark.parametrize("chunks", [1, 7, TOKENS])
def test_the_pictures_show_positions_as_their_methods_define_them(masks, chunks):
    for policy, spec in (
        (SelfExtend(neighbours=6, group_size=4), ReferenceSpec("self-extend", neighbours=6, group_size=4)),
        (DualChunk(chunk=10, positions=W), ReferenceSpec("dual-chunk", chunk=10, positions=W)),
    ):
        table = torch.full((TOKENS, TOKENS), torch.nan, dtype=torch.float64)
        for i in range(TOKENS):
            for j in range(i + 1):
                query, key = places(spec, i, j)
                table[i, j] = query - key
        torch.testing.assert_close(masks.seen_distances(policy, chunks), table, equal_nan=True)


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
                    ids[:, at : at + chunk], attention_mask=mask[:, : at + chunk], **tiny.cached(cache)
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
