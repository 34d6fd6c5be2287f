"""Speed at a depth: what is filled is what would be there, and rates are those of the clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from everlong.attention import FullAttention, LMInfinite, StreamingLLM
from everlong.errors import ConfigurationError, UnsupportedUseError
from everlong.evaluation import speed
from everlong.evaluation.speed import (
    Bookmark,
    decode_seconds,
    fill,
    prefill_seconds,
    random_ids,
    rates,
    rewind,
    step_seconds,
)
from everlong.evaluation.streams import StockStream, open_stream
from tests.evaluation.expected import A_KEY, Clock, stock_logits
from tests.tiny import VOCAB, build
from tests.tiny import random_ids as tokens

W, G = 20, 3


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


def test_random_ids_are_of_the_whole_vocabulary_and_come_again_with_their_generator(model: Any) -> None:
    decoder = model.get_decoder()
    ids = random_ids(decoder, 5000, torch.Generator().manual_seed(1))
    assert ids.shape == (5000,) and set(ids.tolist()) == set(range(VOCAB))
    assert torch.equal(ids, random_ids(decoder, 5000, torch.Generator().manual_seed(1)))
    assert not torch.equal(ids, random_ids(decoder, 5000, torch.Generator().manual_seed(2)))


# --- filling ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 100])
def test_a_stock_cache_is_filled_to_the_depth_and_can_be_gone_on_from(model: Any, depth: int) -> None:
    stream = StockStream(model)
    fill(stream, depth)
    assert stream.seen == depth
    assert stream.bytes() == {"window": 2 * 2 * depth * A_KEY}
    stream.read(tokens(1, 5)[0])
    assert stream.seen == depth + 5


def test_a_stock_cache_is_filled_with_random_keys_of_its_own_type_in_every_layer() -> None:
    stream = StockStream(build("llama").to(torch.bfloat16))
    fill(stream, 3000)
    held = [tensor[:, :, 1:] for pair in stream.layers.values() for tensor in pair]
    assert len(held) == 4
    for tensor in held:
        assert tensor.dtype == torch.bfloat16
        assert abs(float(tensor.float().mean())) < 0.05 and abs(float(tensor.float().std()) - 1) < 0.05
    assert not any(torch.equal(held[0], other) for other in held[1:])


@pytest.mark.parametrize("policy", [LMInfinite(window=W, sinks=G), StreamingLLM(window=W, sinks=G)])
def test_a_window_that_forgets_is_filled_and_read_no_further(model: Any, policy: Any) -> None:
    for depth, read in ((5, 5), (W, W), (W + 8, W + 8), (1_000_000_000, W + 8)):
        with open_stream(model, policy) as stream:
            fill(stream, depth, chunk=8)
            assert (stream.seen, stream.kept) == (read, min(read, W))
    with open_stream(model, policy) as other:
        for begin in range(0, 200, 8):
            other.read(tokens(1, 200)[0, begin : begin + 8])
        assert stream.bytes() == other.bytes()


@pytest.mark.parametrize("policy", [FullAttention(), LMInfinite(window=W, sinks=G, top_k=2, top_k_layers=1)])
def test_a_policy_that_keeps_everything_reads_to_the_depth(model: Any, policy: Any) -> None:
    with open_stream(model, policy) as stream:
        fill(stream, 150, chunk=64)
        assert (stream.seen, stream.kept) == (150, 150)


def test_filling_again_gives_the_same_stream(model: Any) -> None:
    ids = tokens(1, 5)[0]
    for policy in (None, LMInfinite(window=W, sinks=G)):
        hidden = []
        for seed in (0, 0, 1):
            with open_stream(model, policy) as stream:
                fill(stream, 50, seed=seed)
                hidden.append(stream.read(ids))
        assert torch.equal(hidden[0], hidden[1]) and not torch.allclose(hidden[0], hidden[2])


def test_a_stock_stream_is_taken_back_and_a_window_stays_full(model: Any) -> None:
    ids = tokens(1, 60)[0]
    stream = StockStream(model)
    stream.read(ids[:40])
    stream.read(tokens(1, 9, seed=7)[0])
    rewind(stream, 40)
    assert stream.seen == 40
    hidden = stream.read(ids[40:]).clone()
    assert torch.allclose(model.lm_head(hidden), stock_logits(model, ids)[40:], atol=1e-4)
    with open_stream(model, LMInfinite(window=W, sinks=G)) as ours:
        ours.read(ids)
        rewind(ours, 40)
        assert (ours.seen, ours.kept) == (60, W)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma4_text"])
@pytest.mark.parametrize("depth", [4, 40])
def test_a_bookmark_takes_local_layers_back_too(family: str, depth: int) -> None:
    model, ids = build(family), tokens(1, 70)[0]
    stream = StockStream(model)
    stream.read(ids[:depth])
    bookmark = Bookmark(stream)
    before = {number: (k.clone(), v.clone()) for number, (k, v) in stream.layers.items()}
    first = stream.read(ids[depth:]).clone()
    for _ in range(2):
        stream.read(tokens(1, 9, seed=7)[0])
        bookmark.go_back()
        assert stream.seen == depth
        for number, (keys, values) in stream.layers.items():
            assert torch.equal(keys, before[number][0]) and torch.equal(values, before[number][1])
        assert torch.allclose(stream.read(ids[depth:]), first, atol=1e-5)


# --- the clock ----------------------------------------------------------------------------------------


class Timed(StockStream):
    """A stock stream whose reads take what `cost` says of their length."""

    def __init__(self, model: Any, clock: Clock, cost: Callable[[int], float], log: list[Any]) -> None:
        super().__init__(model)
        self._clock, self._cost, self._log = clock, cost, log

    def read(self, ids: Tensor, *, undisturbed: bool = False) -> Tensor:
        self._log.append((self, len(ids), self.seen))
        self._clock.now += self._cost(len(ids))
        return super().read(ids)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    return clock


def test_decoding_reads_the_tokens_one_by_one(model: Any, clock: Clock) -> None:
    log: list[Any] = []
    ids = tokens(1, 30)[0]
    costs = iter([7.0, 1.0, 2.0, 4.0])
    stream = Timed(model, clock, lambda length: next(costs), log)
    assert prefill_seconds(stream, ids[:20]) == 7
    assert decode_seconds(stream, ids[20:23]) == [1, 2, 4]
    assert [(length, seen) for _, length, seen in log] == [(20, 0), (1, 20), (1, 21), (1, 22)]
    last = StockStream(model)
    last.read(ids[:23])
    for (ours, _), (theirs, _) in zip(stream.layers.values(), last.layers.values(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_head_is_counted_where_there_is_one(model: Any, clock: Clock) -> None:
    class SlowHead(torch.nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            clock.now += 100
            assert hidden.shape == (1, 32)
            return hidden

    stream = Timed(model, clock, lambda length: 3.0, [])
    assert decode_seconds(stream, tokens(1, 2)[0], SlowHead()) == [103, 103]


def test_what_a_method_does_every_few_tokens_counts_and_a_moment_of_another_load_does_not() -> None:
    cycles = [([0.0] * (each - 1) + [8.0]) * (64 // each) for each in (2, 4, 8, 16, 32)]
    assert [step_seconds(steps) for steps in cycles] == [4, 2, 1, 0.5, 0.25]
    assert step_seconds([1.0, 1.0, 7.0]) == 3 and step_seconds([2.0]) == 2
    assert step_seconds([100.0] * 5 + [1.0] * 91) == 1


def test_rates_are_medians_of_repeats_taken_in_turn_from_the_same_depth(model: Any, clock: Clock) -> None:
    log: list[Any] = []
    prefill = {"one": iter([9.0, 4.0, 5.0]), "other": iter([1.0, 2.0, 30.0])}
    decode = {"one": iter([0.1, 0.2, 0.3] + [0.1, 0.1, 0.7] + [9.0] * 3), "other": iter([0.7] * 9)}

    def cost(name: str) -> Callable[[int], float]:
        return lambda length: next(decode[name] if length == 1 else prefill[name])

    streams = [Timed(model, clock, lambda length: 0.0, log) for _ in prefill]
    for stream, name, depth in zip(streams, prefill, (30, 40), strict=True):
        fill(stream, depth)
        stream._cost = cost(name)
    log.clear()
    one, other = rates(streams, chunk=8, steps=3, repeats=3)
    assert one == {
        "prefill_tokens_per_second": pytest.approx(8 / 5),
        "decode_ms": pytest.approx(300),
    }
    assert other == {
        "prefill_tokens_per_second": pytest.approx(8 / 2),
        "decode_ms": pytest.approx(700),
    }
    a_turn = [(stream, length, depth + seen) for stream, depth in zip(streams, (30, 40), strict=True)
              for length, seen in ((8, 0), (1, 8), (1, 9), (1, 10))]  # fmt: skip
    assert log == 3 * a_turn
    assert [stream.seen for stream in streams] == [30, 40]


@pytest.mark.parametrize("wrong", ["chunk", "steps", "repeats"])
def test_rates_of_nothing_are_refused(model: Any, wrong: str) -> None:
    options = {"chunk": 1, "steps": 1, "repeats": 1} | {wrong: 0}
    with pytest.raises(ConfigurationError, match="at least 1"):
        rates([StockStream(model)], **options)


def test_a_stock_cache_of_local_layers_is_not_taken_back() -> None:
    stream = StockStream(build("gemma3_text"))
    fill(stream, 40)
    (rate,) = rates([stream], chunk=4, steps=2, repeats=1)
    assert rate["decode_ms"] > 0
    with pytest.raises(UnsupportedUseError, match="repeats=1"):
        rates([stream], chunk=4, steps=2, repeats=2)


def test_nothing_is_no_depth() -> None:
    with pytest.raises(ConfigurationError, match="at least 1 token"):
        fill(StockStream(build("llama")), 0)
