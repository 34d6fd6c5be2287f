"""Streams: the same reading under a policy and without one, and honest accounts of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from everlong.attention import FullAttention, LMInfinite, Policy, StreamingLLM, attach
from everlong.evaluation.streams import PolicyStream, StockStream, Stream, open_stream
from tests.attention.trace_recorder import TraceRecorder
from tests.evaluation.expected import A_KEY, Listening, stock_logits
from tests.reference.attention import ReferenceSpec
from tests.reference.model import reference_logits
from tests.tiny import LOCAL_WINDOW, build, random_ids

LENGTH = 60
W, G = 20, 3


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return random_ids(1, LENGTH)[0]


def read(stream: Stream, ids: Tensor, chunk: int) -> Tensor:
    return torch.cat([stream.read(ids[begin : begin + chunk]) for begin in range(0, len(ids), chunk)])


@pytest.mark.parametrize("chunk", [1, 7, LENGTH])
@pytest.mark.parametrize(
    ("policy", "spec"),
    [
        (None, ReferenceSpec("full")),
        (FullAttention(), ReferenceSpec("full")),
        (LMInfinite(window=W, sinks=G), ReferenceSpec("lm-infinite", G, W, W - 1)),
        (StreamingLLM(window=W, sinks=G), ReferenceSpec("streaming-llm", G, W)),
    ],
)
def test_it_returns_the_hidden_states_of_its_method(
    model: Any, ids: Tensor, policy: Policy | None, spec: ReferenceSpec, chunk: int
) -> None:
    with open_stream(model, policy) as stream:
        hidden = read(stream, ids, chunk)
    assert hidden.shape == (LENGTH, 32)
    assert torch.allclose(model.lm_head(hidden), reference_logits(model, ids[None], spec)[0], atol=1e-4)


@pytest.mark.parametrize("length", [1, W - 1, W, LENGTH])
@pytest.mark.parametrize("chunk", [1, 7])
def test_its_accounts_add_up(model: Any, ids: Tensor, length: int, chunk: int) -> None:
    for policy, kept, forgotten in (
        (None, length, 0),
        (FullAttention(), length, 0),
        (LMInfinite(window=W, sinks=G), min(length, W), max(0, length - W)),
        (StreamingLLM(window=W, sinks=G), min(length, W), max(0, length - W)),
        (LMInfinite(window=W, sinks=G, top_k=2, top_k_layers=1), length, 0),
    ):
        with open_stream(model, policy) as stream:
            assert (stream.seen, stream.kept, stream.forgotten) == (0, 0, 0)
            read(stream, ids[:length], chunk)
            assert (stream.seen, stream.kept, stream.forgotten) == (length, kept, forgotten)


def test_a_stock_stream_holds_two_tensors_a_layer_and_a_full_window_as_many_as_fit(
    model: Any, ids: Tensor
) -> None:
    stock = StockStream(model)
    assert stock.bytes() == {"window": 0}
    read(stock, ids, 7)
    assert stock.bytes() == {"window": 2 * 2 * LENGTH * A_KEY}
    with open_stream(model, LMInfinite(window=W, sinks=G)) as stream:
        read(stream, ids, 7)
        assert stream.bytes() == {"window": 2 * 2 * (W + G) * A_KEY, "ram": 0, "disk": 0}
        assert stream.bytes() == stream.cache.bytes()


def test_local_layers_of_a_stock_stream_count_what_their_window_holds(ids: Tensor) -> None:
    stream = StockStream(build("gemma3_text"))  # one layer of three sees everything
    read(stream, ids, 1)
    assert [keys.shape[2] for keys, _ in stream.layers.values()] == [
        LOCAL_WINDOW - 1,
        LENGTH,
        LOCAL_WINDOW - 1,
    ]
    assert stream.bytes() == {"window": 2 * (LENGTH + 2 * (LOCAL_WINDOW - 1)) * A_KEY}


def test_two_streams_of_a_model_do_not_disturb_each_other(model: Any, ids: Tensor) -> None:
    one, other = StockStream(model), StockStream(model)
    first = one.read(ids[:30])
    other.read(ids[30:])
    both = torch.cat((first, one.read(ids[30:])))
    assert torch.allclose(model.lm_head(both), stock_logits(model, ids), atol=1e-5)
    assert (one.seen, other.seen) == (LENGTH, LENGTH - 30)


def test_the_model_is_detached_at_the_end_and_after_an_error(model: Any, ids: Tensor) -> None:
    before = stock_logits(model, ids)
    with open_stream(model, LMInfinite(window=W, sinks=G)) as stream:
        assert isinstance(stream, PolicyStream)
        assert not torch.equal(stock_logits(model, ids), before)
    assert torch.equal(stock_logits(model, ids), before)
    with pytest.raises(ZeroDivisionError), open_stream(model, LMInfinite(window=W, sinks=G)):
        raise ZeroDivisionError
    assert torch.equal(stock_logits(model, ids), before)
    with open_stream(model, None) as stream:
        assert isinstance(stream, StockStream)
        assert torch.equal(stock_logits(model, ids), before)


def test_what_is_told_reaches_the_policy_as_one_row(model: Any, ids: Tensor) -> None:
    policy = Listening(window=W, sinks=G)
    surprisal = torch.rand(LENGTH)
    for chosen in (policy, None):
        with open_stream(model, chosen) as stream:
            stream.read(ids)
            stream.told(ids, surprisal)
            stream.end_reading()
    (tokens, told), end = policy.heard
    assert torch.equal(tokens, ids[None]) and torch.equal(told, surprisal[None])
    assert end == "writing"


def test_reading_keeps_no_gradients(model: Any, ids: Tensor) -> None:
    for policy in (None, LMInfinite(window=W, sinks=G)):
        with open_stream(model, policy) as stream:
            assert stream.read(ids).requires_grad is False


def test_a_stock_model_whose_layers_share_keys_is_read_too() -> None:
    stream = StockStream(build("gemma4_text"))
    stream.read(random_ids(1, 20)[0])
    assert set(stream.layers) == {0, 1}
    assert stream.bytes()["window"] == sum(k.nbytes + v.nbytes for k, v in stream.layers.values()) > 0


def test_single_tokens_go_by_recorded_steps_where_a_session_would_write_so(model: Any, ids: Tensor) -> None:
    with attach(model, LMInfinite(window=W, sinks=G)) as handle:
        recorder = handle.steps.recorder = TraceRecorder()
        recorded, plain = PolicyStream(handle), PolicyStream(handle)
        found = read(recorded, ids, 1)
        fork = recorded.fork()
        handle.steps.stop()
        assert torch.allclose(found, read(plain, ids, 1), atol=1e-5)
        assert torch.allclose(fork.read(ids[:1]), plain.read(ids[:1]), atol=1e-5)
    assert recorder.replayed > W
