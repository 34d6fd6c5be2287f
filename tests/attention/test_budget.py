"""Budgets in bytes become the most tokens that fit, of each policy and each model's layers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from everlong.attention import (
    H2O,
    Bytes,
    FullAttention,
    InfiniPot,
    InfLLM,
    LMInfinite,
    Policy,
    PyramidKV,
    Quest,
    ReAttention,
    Recall,
    SnapKV,
    StreamCache,
    StreamingLLM,
    attach,
    make_policy,
)
from everlong.attention.attach import Attachment
from everlong.errors import ConfigurationError, EverlongError
from everlong.llm import load
from tests.evaluation.expected import A_KEY
from tests.tiny import build, byte_llama, cached, random_ids

WINDOWS: dict[str, Policy] = {
    "lm-infinite": LMInfinite(window=Bytes("24kb"), sinks=3),
    "streaming-llm": StreamingLLM(window=Bytes("24kb"), sinks=3),
    "h2o": H2O(window=Bytes("24kb"), sinks=2),
    "infini-pot": InfiniPot(window=Bytes("24kb"), sinks=0),
    "recall": Recall(window=Bytes("24kb"), sinks=2, block=2),
    "inf-llm": InfLLM(window=Bytes("24kb"), sinks=2, block=2, representatives=1),
    "quest": Quest(window=Bytes("24kb"), sinks=2, block=2),
    "re-attention": ReAttention(window=Bytes("24kb"), sinks=2, radius=1),
}
NOTES = {"inf-llm", "quest", "h2o", "infini-pot"}
"""Notes of tokens, and room for more of them, come on top."""


def read(handle: Attachment, tokens: int) -> StreamCache:
    cache, ids = handle.new_cache(), random_ids(1, tokens)
    with torch.no_grad():
        for piece in ids.split(7, 1):
            handle.model(piece, **cached(cache), use_cache=True)
    return cache


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma4_text"])
@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_in_bytes_is_the_largest_that_fits(name: str, family: str) -> None:
    policy, limit = WINDOWS[name], 24_000
    with attach(build(family), policy) as handle:
        window: int = handle.policy.span or 0
        assert type(window) is int
        cache = read(handle, 3 * window)
        assert cache.bytes_at(3 * window)["window"] <= limit or name in NOTES
        noting = cache.memories.values() if name == "recall" else ()  # four bytes a block come on top
        notes = sum(noted.nbytes for memory in noting for noted in memory.index.values())
        assert name in NOTES or cache.bytes()["window"] - notes <= limit
    wider: Any = policy
    with attach(build(family), dataclasses.replace(wider, window=window + 8)) as handle:
        assert read(handle, 3 * window + 24).bytes_at(10**6)["window"] > limit


def test_a_full_window_takes_what_its_keys_and_values_do() -> None:
    layers, sinks, limit = 2, 3, 24_000
    with attach(build("llama"), WINDOWS["lm-infinite"]) as handle:
        assert handle.policy.span == limit // (layers * 2 * A_KEY) - sinks


def test_layers_with_windows_of_their_own_are_counted_whatever_the_budget() -> None:
    spans = []
    for family in ("llama", "gemma3_text"):
        with attach(build(family), LMInfinite(window=Bytes(100_000), sinks=3)) as handle:
            spans.append(read(handle, 900).bytes_at(900)["window"])
    assert all(99_000 < held <= 100_000 for held in spans)


@pytest.mark.parametrize("policy", [SnapKV(budget=Bytes("40kb")), PyramidKV(budget=Bytes("40kb"))])
def test_a_budget_in_bytes_is_of_what_is_kept(policy: SnapKV) -> None:
    with attach(build("llama"), policy) as handle:
        followed: Any = handle.policy
        assert 0.8 * 40_000 < 2 * 2 * A_KEY * followed.budget <= 40_000
        cache = read(handle, 3 * followed.budget)
        followed.end_of_prefill(cache)
        assert sum(2 * memory.held * A_KEY for memory in cache.memories.values()) <= 40_000


def test_streams_have_budgets_of_their_own() -> None:
    with attach(build("llama"), FullAttention()) as handle:
        cache = handle.new_cache(LMInfinite(window=Bytes(24_000), sinks=3))
        assert cache.policy.span == 24_000 // (4 * A_KEY) - 3
    model, tokenizer = byte_llama()
    with load(model, FullAttention(), tokenizer=tokenizer) as llm:
        session = llm.session(LMInfinite(window=Bytes(24_000), sinks=3))
        session.read("It is a truth universally acknowledged. " * 20)
        assert session.stats.bytes["window"] <= 24_000


@pytest.mark.parametrize("text", ["24kb", "24 KB", "0.024MB", "24000 bytes"])
def test_names_and_options_tell_bytes_by_their_unit(text: str) -> None:
    assert make_policy("lm-infinite", {"window": text}) == LMInfinite(window=Bytes(24_000))
    assert isinstance(make_policy("lm-infinite", {"window": text}).span, Bytes)
    assert not isinstance(make_policy("lm-infinite", {"window": "24000"}).span, Bytes)


def test_bytes_show_what_they_are() -> None:
    assert repr(LMInfinite(window=Bytes("2kb"))).startswith("LMInfinite(sinks=10, window=Bytes(2000)")


@pytest.mark.parametrize("text", ["much", "", "-4kb", "4 pages"])
def test_what_is_no_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="no number of bytes"):
        Bytes(text)


@dataclass(frozen=True)
class Endless(FullAttention):
    """A policy whose window bounds nothing."""

    window: int | None = None


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (LMInfinite(window=Bytes(100)), "0 tokens are too few"),
        (Recall(window=Bytes(3000), sinks=2, block=2), "at least|too few"),
        (LMInfinite(window=100, sinks=Bytes(10)), "in bytes"),
        (Endless(window=Bytes(3000)), "holds all it reads"),
    ],
)
def test_what_cannot_fit_is_refused_and_leaves_no_trace(policy: Policy, message: str) -> None:
    model = build("llama")
    with pytest.raises(EverlongError, match=message):
        attach(model, policy)
    with attach(model, FullAttention()) as handle:
        with pytest.raises(EverlongError, match=message):
            handle.new_cache(policy)
        read(handle, 3)


def test_nobody_takes_bytes_for_tokens() -> None:
    with pytest.raises(ConfigurationError, match=r"attach\(\)"):
        LMInfinite(window=Bytes(24_000)).resolve(1000)
