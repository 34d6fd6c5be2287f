"""With a budget that holds the whole input, every family gives the stock model's logits."""

import pytest
import torch

import tests.tiny as tiny
from everlong.attention import H2O, FullAttention, LMInfinite, StreamingLLM, attach

LENGTH = 40
POLICIES = [
    FullAttention(),
    LMInfinite(window=LENGTH, sinks=4),
    StreamingLLM(window=LENGTH),
    H2O(window=LENGTH),
]


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def stock(request):
    model = tiny.build(request.param)
    if request.param == "gemma2":  # older releases leave the soft-cap out of every kernel but this one
        model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (2, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad():
        return model, ids, mask, model(ids).logits, model(ids, attention_mask=mask).logits


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
@torch.no_grad()
def test_one_call_chunks_and_single_tokens_equal_stock(stock, policy):
    model, ids, mask, plain, padded = stock
    real = mask.bool()
    with attach(model, policy) as handle:
        assert torch.allclose(model(ids).logits, plain, atol=1e-4)
        for edges in ((0, LENGTH), (0, 3, 4, 5, 21, 22, LENGTH), range(LENGTH + 1)):
            cache = handle.new_cache()
            pieces = [
                model(ids[:, a:b], attention_mask=mask[:, :b], **tiny.cached(cache), use_cache=True).logits
                for a, b in zip(edges, edges[1:], strict=False)
            ]
            ours = torch.cat(pieces, dim=1)
            assert torch.allclose(ours[real], padded[real], atol=1e-4)
    assert torch.equal(model(ids).logits, plain), "detaching left a trace"


@torch.no_grad()
def test_a_smaller_window_changes_the_logits(stock):
    """Otherwise the equalities above could hold because nothing was attached."""
    model, ids, _, plain, _ = stock
    with attach(model, LMInfinite(window=12, sinks=2)) as handle:
        if all(layer.window is not None for layer in handle._layers.kept.values()):
            pytest.skip("all layers are local: there is nothing for a policy to govern")
        assert not torch.allclose(model(ids).logits, plain, atol=1e-3)
