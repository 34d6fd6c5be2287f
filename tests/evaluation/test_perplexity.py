"""Perplexity by position: each surprisal is the stock model's or the reference's, however it was read."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from everlong.attention import FullAttention, LMInfinite, Policy, StreamingLLM
from everlong.errors import InputError, NumericalError
from everlong.evaluation import perplexity as perplexity_module
from everlong.evaluation.perplexity import Reading, bucketed, read_stream
from everlong.evaluation.streams import StockStream, open_stream
from everlong.models.head import Head
from everlong.reading.reports import Progress
from tests.evaluation.expected import A_KEY, Clock, Listening, perplexity_of, stock_logits, surprisal_of
from tests.reference.attention import ReferenceSpec
from tests.reference.model import reference_logits
from tests.tiny import build, random_ids

LENGTH = 60
W, G = 20, 3


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return random_ids(1, LENGTH)[0]


def read(model: Any, ids: Tensor, policy: Policy | None = None, **options: Any) -> Reading:
    with open_stream(model, policy) as stream:
        return read_stream(stream, Head(model), ids, **options)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    assert torch.allclose(ours, theirs.float(), atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("chunk", [1, 7, LENGTH, 512])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "granite", "cohere2"])
def test_without_a_policy_each_token_has_the_stock_models_surprisal(family: str, chunk: int) -> None:
    model, ids = build(family), random_ids(1, LENGTH)[0]
    reading = read(model, ids, chunk=chunk)
    assert_same(reading.surprisal, surprisal_of(stock_logits(model, ids), ids))


@pytest.mark.parametrize("chunk", [1, 7, 512])
@pytest.mark.parametrize(
    ("policy", "spec"),
    [
        (LMInfinite(window=W, sinks=G), ReferenceSpec("lm-infinite", G, W, W - 1)),
        (StreamingLLM(window=W, sinks=G), ReferenceSpec("streaming-llm", G, W)),
        (FullAttention(), ReferenceSpec("full")),
    ],
)
def test_under_a_policy_each_token_has_the_references_surprisal(
    model: Any, ids: Tensor, policy: Policy, spec: ReferenceSpec, chunk: int
) -> None:
    reading = read(model, ids, policy, chunk=chunk)
    assert_same(reading.surprisal, surprisal_of(reference_logits(model, ids[None], spec)[0], ids))


def test_only_the_first_token_of_a_text_has_no_surprisal(model: Any, ids: Tensor) -> None:
    for chunk in (1, 7, 512):
        assert read(model, ids, chunk=chunk).surprisal.isnan().nonzero().tolist() == [[0]]
    assert read(model, ids[:1]).surprisal.isnan().tolist() == [True]


def test_a_stream_that_is_gone_on_with_predicts_from_all_it_has_read(model: Any, ids: Tensor) -> None:
    stream, head = StockStream(model), Head(model)
    read_stream(stream, head, ids[:25])
    second = read_stream(stream, head, ids[25:], chunk=8).surprisal
    expected = surprisal_of(stock_logits(model, ids), ids)[25:]
    assert second[0].isnan()
    assert_same(second[1:], expected[1:])


def test_after_a_hidden_state_the_first_token_is_scored_too(model: Any, ids: Tensor) -> None:
    stream, head = StockStream(model), Head(model)
    told: list[Progress] = []
    first = read_stream(stream, head, ids[:25])
    second = read_stream(stream, head, ids[25:], chunk=8, after=first.last_hidden, progress=told.append)
    expected = surprisal_of(stock_logits(model, ids), ids)[25:]
    assert_same(second.surprisal, expected)
    assert told[0].perplexity == pytest.approx(perplexity_of(expected[:8].tolist()), rel=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_the_last_hidden_state_predicts_what_comes_next(model: Any, ids: Tensor, chunk: int) -> None:
    reading = read(model, ids, chunk=chunk)
    assert reading.last_hidden.shape == (1, 32)
    assert_same(Head(model).logits(reading.last_hidden)[0], stock_logits(model, ids)[-1])


def test_each_chunk_says_what_it_cost_and_scoring_is_not_counted(
    model: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(perplexity_module, "time", clock)

    class Slow(StockStream):
        def read(self, ids: Tensor, *, undisturbed: bool = False) -> Tensor:
            clock.now += 2.0 * len(ids)
            return super().read(ids)

    class SlowHead(Head):
        def surprisal(self, hidden: Tensor, targets: Tensor) -> Tensor:
            clock.now += 1000.0
            return super().surprisal(hidden, targets)

    told: list[Progress] = []
    reading = read_stream(Slow(model), SlowHead(model), ids, chunk=25, progress=told.append)
    assert [(c.stop, c.tokens, c.seconds) for c in reading.chunks] == [
        (25, 25, 50),
        (50, 25, 50),
        (60, 10, 20),
    ]
    assert [c.bytes for c in reading.chunks] == [2 * 2 * A_KEY * stop for stop in (25, 50, 60)]
    assert reading.seconds == 120
    expected = surprisal_of(stock_logits(model, ids), ids)
    for report, stop in zip(told, (25, 50, 60), strict=True):
        assert (report.tokens, report.total, report.seconds) == (stop, LENGTH, 2 * stop)
        assert report.tokens_per_second == 0.5
        assert report.bytes == {"window": 2 * 2 * A_KEY * stop}
        assert report.perplexity == pytest.approx(perplexity_of(expected[:stop].tolist()), rel=1e-4)


@pytest.mark.parametrize("chunk", [1, 25, 512])
def test_a_policy_is_told_each_token_and_its_surprisal(model: Any, ids: Tensor, chunk: int) -> None:
    policy = Listening(window=W, sinks=G)
    reading = read(model, ids, policy, chunk=chunk)
    tokens = torch.cat([tokens for tokens, _ in policy.heard], dim=1)
    surprisal = torch.cat([surprisal for _, surprisal in policy.heard], dim=1)
    assert torch.equal(tokens, ids[None])
    assert torch.equal(surprisal, torch.cat((torch.zeros(1), reading.surprisal[1:]))[None])


def test_values_that_are_not_finite_are_refused_with_their_place(ids: Tensor) -> None:
    model = build("llama")
    head = Head(model)
    tokens = ids.clone()
    tokens[tokens == 5] = 6
    tokens[33] = 5
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = math.nan
    assert read_stream(StockStream(model), head, tokens[:33], chunk=10).surprisal[1:].isfinite().all()
    with pytest.raises(NumericalError, match=r"between tokens 30 and 40 .*bfloat16"):
        read_stream(StockStream(model), head, tokens, chunk=10)


@pytest.mark.parametrize("wrong", [torch.empty(0, dtype=torch.long), torch.ones(1, 5, dtype=torch.long)])
def test_what_is_not_one_row_of_ids_is_refused_with_its_shape(model: Any, wrong: Tensor) -> None:
    with pytest.raises(InputError, match=str(tuple(wrong.shape)).replace("(", r"\(").replace(")", r"\)")):
        read(model, wrong)


# --- buckets ------------------------------------------------------------------------------------------


def test_a_bucket_holds_the_perplexity_of_its_positions() -> None:
    surprisal = torch.rand(250, generator=torch.Generator().manual_seed(0)) * 5
    surprisal[0] = math.nan
    buckets = bucketed(surprisal, 100)
    assert [(b.start, b.stop, b.tokens) for b in buckets] == [(0, 100, 99), (100, 200, 100), (200, 250, 50)]
    for bucket in buckets:
        expected = perplexity_of(surprisal[bucket.start : bucket.stop].tolist())
        assert bucket.perplexity == pytest.approx(expected, rel=1e-6)
    assert [(b.start, b.stop) for b in bucketed(surprisal, 200, start=7)] == [(7, 207), (207, 257)]


def test_a_bucket_without_scored_tokens_is_left_out() -> None:
    surprisal = torch.full((6,), math.nan)
    surprisal[4] = math.log(3)
    (bucket,) = bucketed(surprisal, 2)
    assert (bucket.start, bucket.stop, bucket.tokens) == (4, 6, 1)
    assert bucket.perplexity == pytest.approx(3)
    assert bucketed(surprisal[:4], 2) == []


def test_a_buckets_interval_is_that_of_the_means_of_its_blocks() -> None:
    means = [1.0, 1.5, 2.5]  # of blocks of 32; Student's t with 2 degrees of freedom: 4.3027
    surprisal = torch.tensor([mean + sign for mean in means for sign in (-0.5, 0.5) * 16])
    (bucket,) = bucketed(surprisal, 96)
    mean, deviation = 5 / 3, math.sqrt(sum((m - 5 / 3) ** 2 for m in means) / 2)
    half = 4.3027 * deviation / math.sqrt(3)
    assert math.log(bucket.low) == pytest.approx(mean - half, abs=1e-3)
    assert math.log(bucket.high) == pytest.approx(mean + half, abs=1e-3)


def test_a_bucket_too_short_for_an_interval_says_so_and_a_huge_surprisal_is_no_error() -> None:
    (short,) = bucketed(torch.ones(40), 40)
    assert (short.low, short.high) == (0, math.inf) and short.perplexity == pytest.approx(math.e)
    (huge,) = bucketed(torch.full((64,), 1e4), 64)
    assert huge.perplexity == huge.low == huge.high == math.inf
