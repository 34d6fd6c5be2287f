"""An attached model does not rotate by nothing, unless its rotation does something else besides."""

import pytest
import torch
from transformers.models.llama import modeling_llama

from everlong.attention import FullAttention, attach
from everlong.models.anatomy import dissect
from everlong.models.unrotated import unrotated
from tests import tiny

ROTATE = modeling_llama.apply_rotary_pos_emb


@pytest.fixture
def calls(monkeypatch):
    """Every call of Llama's rotation is noted."""
    noted = []

    def counted(q, k, cos, sin, unsqueeze_dim=1):
        noted.append(q.shape)
        return ROTATE(q, k, cos, sin, unsqueeze_dim)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", counted)
    return noted


@torch.no_grad()
def test_an_attached_model_never_calls_its_own_rotation(calls):
    model, ids = tiny.build("llama"), tiny.random_ids(1, 20)
    plain = model(ids).logits
    with attach(model, FullAttention()):
        calls.clear()
        ours = model(ids).logits
        assert not calls
    assert torch.equal(model(ids).logits, plain) and len(calls) == model.config.num_hidden_layers
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_rotation_that_does_more_is_called(monkeypatch):
    def doubling(q, k, cos, sin, unsqueeze_dim=1):
        q, k = ROTATE(q, k, cos, sin, unsqueeze_dim)
        return 2 * q, k

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", doubling)
    model, ids = tiny.build("llama"), tiny.random_ids(1, 20)
    anatomy = dissect(model)
    assert not anatomy.can_skip_rotation
    expected = model(ids).logits
    with attach(model, FullAttention()):
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_is_spared_it(family):
    assert dissect(tiny.build(family)).can_skip_rotation


def test_modules_with_a_forward_of_their_own_are_left_alone_and_others_restored():
    model = tiny.build("llama")
    hooked, free = (layer.self_attn for layer in model.model.layers)
    hooked.forward = own = lambda *args, **kwargs: None
    with unrotated([hooked, free]):
        assert hooked.forward is own
        assert "forward" in free.__dict__
    assert hooked.__dict__["forward"] is own and "forward" not in free.__dict__
