"""Gradients through an attached model: stock's own, where stock can be told to see the same."""

import pytest
import torch

import tests.tiny as tiny
from everlong.attention import FullAttention, LMInfinite, StreamingLLM, attach

WINDOW, LENGTH = 24, 60


@pytest.fixture(scope="module")
def model():
    return tiny.build("llama")


@pytest.fixture(scope="module")
def ids():
    return tiny.random_ids(2, LENGTH)


def _gradients(model, ids, **arguments):
    model.zero_grad()
    logits = model(ids, use_cache=False, **arguments).logits
    labels = ids.masked_fill((ids == 0) | (ids.roll(1, 1) == 0), -100)  # 0 is padding, and predicts nothing
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def _assert_same_gradients(ours, theirs):
    for name, gradient in theirs.items():
        scale = gradient.abs().max().clamp(min=1e-6)
        assert (ours[name] - gradient).abs().max() <= 1e-4 * scale, name


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "qwen3_moe"])
def test_gradients_equal_stock_when_the_window_holds_everything(family):
    model, ids = tiny.build(family), tiny.random_ids(2, 20)
    model.set_attn_implementation("eager")
    stock = _gradients(model.train(), ids)
    for policy in (LMInfinite(window=20, sinks=3), StreamingLLM(window=20), FullAttention()):
        with attach(model, policy):
            _assert_same_gradients(_gradients(model, ids), stock)


@pytest.mark.parametrize("lengths", [[LENGTH, LENGTH], [LENGTH, 45]], ids=["even", "padded"])
def test_gradients_beyond_the_window_equal_stock_under_the_same_mask(model, lengths):
    """Without a ceiling LM-Infinite is a mask, which stock takes as an argument."""
    ids, padding = tiny.left_padded(lengths)
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    own = torch.arange(LENGTH) - (LENGTH - torch.tensor(lengths))[:, None, None, None]
    visible = (distance >= 0) & ((distance < WINDOW - 3) | (own < 3)) & (own >= 0)
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    stock = _gradients(model, ids, attention_mask=mask)
    with attach(model, LMInfinite(window=WINDOW, sinks=3, ceiling=None)):
        _assert_same_gradients(_gradients(model, ids, attention_mask=padding), stock)


def test_training_with_a_kept_cache_does_not_reach_back_into_it(model, ids):
    with attach(model, LMInfinite(window=WINDOW, sinks=3)) as handle:
        cache = handle.new_cache()
        model(ids[:, :40], **tiny.cached(cache)).logits.sum().backward()
        model(ids[:, 40:], **tiny.cached(cache)).logits.sum().backward()  # a second time through would raise
    model.zero_grad()
