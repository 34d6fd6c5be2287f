"""What a read will cost: tokens as tokenised at once, bytes as a cache really holds them, time on a line."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from everlong.attention import (
    Attachment,
    DualChunk,
    FullAttention,
    LMInfinite,
    Policy,
    SelfExtend,
    StreamCache,
    StreamingLLM,
    attach,
)
from everlong.errors import InputError, StateError
from everlong.evaluation import estimate as estimate_module
from everlong.evaluation.estimate import count_tokens, estimate
from everlong.reading.driver import Driver
from tests.evaluation.expected import A_KEY, Clock, Listening, stock_logits
from tests.reading.small_tokenizers import PAGE, trained
from tests.tiny import build, byte_tokenizer, cached, random_ids

W, G = 20, 3
WINDOWS: dict[str, Policy] = {
    "lm-infinite": LMInfinite(window=W, sinks=G),
    "a ceiling inside": LMInfinite(window=W, sinks=G, ceiling=5),
    "no sinks": LMInfinite(window=W, sinks=0),
    "streaming-llm": StreamingLLM(window=W, sinks=G),
}
GROWING: dict[str, Policy] = {
    "full": FullAttention(),
    "full with a ceiling": FullAttention(ceiling=9),
    "self-extend": SelfExtend(neighbours=W, group_size=3),
    "dual-chunk": DualChunk(chunk=W, positions=2 * W),
    "top_k": LMInfinite(window=W, sinks=G, top_k=2, top_k_layers=1),
}
POLICIES = WINDOWS | GROWING


# --- tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama2", "gemma", "unigram", "bytes"])
def test_tokens_are_counted_as_tokenised_at_once(kind: str, tmp_path: Path) -> None:
    tokenizer: Any = byte_tokenizer(add_bos=True) if kind == "bytes" else trained(kind)
    path = tmp_path / "text.txt"
    for text in ("a", "It is a truth", PAGE * 12):
        path.write_text(text, encoding="utf-8")
        text = path.read_text(encoding="utf-8")
        expected = len(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        pieces = [text[start : start + 777] for start in range(0, len(text), 777)]
        for source in (text, path, io.StringIO(text), io.BytesIO(text.encode()), pieces, iter(pieces)):
            assert count_tokens(tokenizer, source) == expected


def test_special_tokens_spelled_out_count_as_their_characters() -> None:
    assert count_tokens(byte_tokenizer(), "a</s>b") == 6


def test_ids_count_as_they_are() -> None:
    assert count_tokens(byte_tokenizer(), torch.ones(40_000, dtype=torch.long)) == 40_000
    assert count_tokens(byte_tokenizer(), [1, 2, 3]) == 3


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "empty"), (b"abc\0", "not a text file"), (None, "cannot open")]
)
def test_what_cannot_be_read_cannot_be_counted(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(InputError, match=message):
        count_tokens(byte_tokenizer(), tmp_path / "file")


# --- bytes --------------------------------------------------------------------------------------------


def read(handle: Attachment, tokens: int, chunk: int, rows: int = 1) -> StreamCache:
    cache = handle.new_cache()
    ids = random_ids(rows, tokens)
    with torch.no_grad():
        for begin in range(0, tokens, chunk):
            handle.model(ids[:, begin : begin + chunk], **cached(cache), use_cache=True)
    return cache


def occupied(cache: StreamCache) -> int:
    """Bytes of what a saved cache would hold: all of it, and no spare room."""
    return sum(tensor.nbytes for tensor in cache.state()[0].values())


@pytest.mark.thin
@pytest.mark.parametrize("chunk", [1, 13, 128])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("policy", WINDOWS)
def test_a_full_window_holds_what_was_foretold(policy: str, family: str, chunk: int) -> None:
    with attach(build(family), POLICIES[policy]) as handle:
        early = read(handle, 2, 1)
        for tokens in (W, W + 1, 100):
            cache = read(handle, tokens, chunk)
            assert early.bytes_at(tokens) == cache.bytes() == cache.bytes_at(tokens)
            assert sum(cache.bytes().values()) == occupied(cache)


@pytest.mark.parametrize("tokens", [1, 2, W - 1, W, W + 1, 300])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma4_text"])
@pytest.mark.parametrize("policy", POLICIES)
def test_what_was_foretold_is_what_is_in_use(policy: str, family: str, tokens: int) -> None:
    with attach(build(family), POLICIES[policy]) as handle:
        cache = read(handle, tokens, 13)
        foretold = read(handle, 5, 5).bytes_at(tokens)
        assert sum(foretold.values()) == occupied(cache)
        assert foretold == cache.bytes_at(tokens)
        for tier, held in cache.bytes().items():  # spare room: a quarter, or a little; notes double
            assert foretold[tier] <= held <= 1.25 * foretold[tier] + 2 * 4 * 64 * 4 * A_KEY


def test_bytes_are_what_the_layers_keys_and_values_take() -> None:
    with attach(build("llama"), LMInfinite(window=W, sinks=G)) as handle:
        cache = read(handle, 5, 5)
    assert cache.bytes_at(1) == {"window": 2 * 2 * (1 + G) * A_KEY, "ram": 0, "disk": 0}
    assert cache.bytes_at(10**9) == {"window": 2 * 2 * (W + G) * A_KEY, "ram": 0, "disk": 0}
    with attach(build("llama"), FullAttention()) as handle:
        assert read(handle, 5, 5).bytes_at(10**9) == {"window": 2 * 2 * 10**9 * A_KEY, "ram": 0, "disk": 0}
        assert read(handle, 5, 5, rows=3).bytes_at(100) == {
            "window": 3 * 2 * 2 * 100 * A_KEY,
            "ram": 0,
            "disk": 0,
        }
    with attach(build("llama"), GROWING["top_k"]) as handle:  # the second layer has raw keys and a tier
        cache = read(handle, 5, 5)
    blocks, left = divmod(980, 64)
    assert cache.bytes_at(1000) == {
        "window": (2 + 3) * W * A_KEY + 4 * G * A_KEY,
        "ram": blocks * 64 * A_KEY + 2 * left * A_KEY,  # of whole blocks, in half precision
        "disk": 0,
    }


def test_an_empty_cache_cannot_tell() -> None:
    with (
        attach(build("llama"), LMInfinite(window=W, sinks=G)) as handle,
        pytest.raises(StateError, match="read"),
    ):
        handle.new_cache().bytes_at(10)


# --- an estimate --------------------------------------------------------------------------------------


@pytest.mark.parametrize("surprisal", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 130, 100_000])
@pytest.mark.parametrize("policy", ["lm-infinite", *GROWING])
def test_an_estimate_names_tokens_bytes_and_some_time(policy: str, tokens: int, surprisal: bool) -> None:
    with attach(build("gemma3_text"), POLICIES[policy]) as handle:
        found = estimate(handle, tokens, chunk=64, surprisal=surprisal)
        if tokens <= 130:
            assert sum(found.bytes.values()) == occupied(read(handle, tokens, 64))
        assert found.bytes == read(handle, 5, 5).bytes_at(tokens)
    assert found.tokens == tokens
    for value in (found.seconds, found.last_tokens_per_second):
        assert math.isfinite(value) and value > 0


class Line(Driver):
    """A driver that takes `a`, and `b` for each key before its chunk, in seconds of a clock of its own."""

    clock = Clock()
    a, b, warm_up = 3.0, 0.5, 1000.0
    runs: list[int] = []

    def run(self, ids: Sequence[int], *, logits: bool) -> Any:
        assert not logits  # a read needs none
        seen = self.cache.seen
        keys = seen if not self.cache.policy.forgets else min(seen, W)
        self.clock.now += self.a + self.b * keys + (0 if seen else self.warm_up)
        self.runs.append(len(ids))
        return super().run(ids, logits=logits)


@pytest.mark.parametrize("tokens", [4, 12, 33, 1000])
@pytest.mark.parametrize("policy", ["lm-infinite", "full"])
def test_time_grows_with_the_keys_a_chunk_sees_until_the_window_is_full(
    policy: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate_module, "Driver", Line)
    monkeypatch.setattr(estimate_module, "time", Line.clock)
    with attach(build("llama"), POLICIES[policy]) as handle:
        found = estimate(handle, tokens, chunk=4)
    bound = W if policy in WINDOWS else tokens
    costs = [3.0 + 0.5 * min(seen, bound) for seen in range(0, tokens, 4)]
    last = tokens % 4 or 4
    assert found.seconds == pytest.approx(sum(costs[:-1]) + costs[-1] * last / 4)
    assert found.last_tokens_per_second == pytest.approx(4 / costs[-1])


def test_time_that_seems_to_fall_is_taken_as_its_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_module, "Driver", Line)
    monkeypatch.setattr(estimate_module, "time", Line.clock)
    monkeypatch.setattr(Line, "a", 60.0)
    monkeypatch.setattr(Line, "b", -1.0)
    with attach(build("llama"), FullAttention()) as handle:
        found = estimate(handle, 1000, chunk=10)
    assert found.seconds == pytest.approx(100 * (60 - 25))  # measured at 10, 20, 30 and 40 keys


def test_few_chunks_are_read_however_long_the_text_and_fewer_of_a_short_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(estimate_module, "Driver", Line)
    with attach(build("llama"), FullAttention()) as handle:
        for tokens, expected in ((1_000_000, 5 * [16]), (48, 4 * [16]), (7, 3 * [7])):
            monkeypatch.setattr(Line, "runs", [])
            estimate(handle, tokens, chunk=16)
            assert Line.runs == expected


def test_the_model_stays_as_it_was_and_only_a_read_with_surprisal_computes_it() -> None:
    model, policy = build("llama"), Listening(window=W, sinks=G)
    with attach(model, policy) as handle:
        ids = random_ids(1, 50)[0]
        before = stock_logits(model, ids)
        for asked in (False, True):
            policy.heard.clear()
            estimate(handle, 30, chunk=8, surprisal=asked)
            assert {surprisal is not None for _, surprisal in policy.heard} == {asked}
        assert torch.equal(stock_logits(model, ids), before)


@pytest.mark.parametrize("tokens", [0, -1])
def test_nothing_cannot_be_estimated(tokens: int) -> None:
    with (
        attach(build("llama"), FullAttention()) as handle,
        pytest.raises(InputError, match=f"{tokens} tokens"),
    ):
        estimate(handle, tokens)
