"""Leaving an attachment gives the model back exactly, however it ends."""

import copy
import pickle

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tests.tiny as tiny
from everlong.attention import FullAttention, LMInfinite, StreamingLLM, attach
from everlong.errors import ConfigurationError, StateError, UnsupportedUseError

POLICY = LMInfinite(window=24, sinks=3)
SCALED = {
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        "max_position_embeddings": 16,
    },
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 4.0, 8.0],
            "original_max_position_embeddings": 16,
        },
        "max_position_embeddings": 64,
    },
}
MODELS = {
    "llama": lambda: tiny.build("llama"),
    "gemma3": lambda: tiny.build("gemma3_text"),
    "gpt_oss": lambda: tiny.build("gpt_oss"),
    "gemma4": lambda: tiny.build("gemma4_text"),
    "dynamic": lambda: tiny.build("llama", **SCALED["dynamic"]),
    "longrope": lambda: tiny.build("llama", **SCALED["longrope"]),
}


def fingerprint(model):
    """Everything a module holds: which objects, and what the tensors and settings among them contain."""
    state: dict = {"functions": dict(ALL_ATTENTION_FUNCTIONS.items())}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, dict):  # parameters, buffers, modules, hooks
                content = {k: id(v) for k, v in value.items()}
                tensors = {k: v.clone() for k, v in value.items() if isinstance(v, torch.Tensor)}
            else:
                content, tensors = id(value), {}
            if isinstance(value, torch.Tensor):
                tensors[""] = value.clone()
            state[name, key] = content
            state.update({(name, key, k): v.tolist() for k, v in tensors.items()})
            if key == "config":
                state[name, key, "content"] = value.to_dict(), value._attn_implementation
    return state


def run_everything(model):
    ids = tiny.random_ids(2, 50)
    model(ids)
    model.generate(ids[:, :30], max_new_tokens=5, do_sample=False)
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=True)


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@torch.no_grad()
def test_leaving_the_block_restores_every_object_and_value(model):
    ids = tiny.random_ids(2, 50)
    before, logits = fingerprint(model), model(ids[:, :12]).logits
    before = fingerprint(model)
    for policy in (POLICY, StreamingLLM(window=20), FullAttention()):
        with attach(model, policy):
            assert fingerprint(model) != before
            run_everything(model)
        assert fingerprint(model) == before
    assert torch.equal(model(ids[:, :12]).logits, logits)


@torch.no_grad()
def test_a_table_that_stock_has_grown_stays_grown(model):
    """Dynamic tables remember the longest input; attaching must neither reset nor grow them."""
    model(tiny.random_ids(1, 40))
    before = fingerprint(model)
    with attach(model, POLICY):
        run_everything(model)
    assert fingerprint(model) == before


@torch.no_grad()
def test_an_exception_in_the_block_restores_the_model(model):
    before = fingerprint(model)
    with pytest.raises(ZeroDivisionError), attach(model, POLICY):
        run_everything(model)
        raise ZeroDivisionError
    assert fingerprint(model) == before


@torch.no_grad()
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_inside_a_forward_restores_the_model(model, error):
    before, ids = fingerprint(model), tiny.random_ids(1, 20)
    logits = model(ids[:, :12]).logits
    before = fingerprint(model)

    def fail(*_):
        raise error

    with pytest.raises(error), attach(model, POLICY):
        hook = model.model.layers[1].register_forward_pre_hook(fail)
        try:
            model(ids)
        finally:
            hook.remove()
    assert fingerprint(model) == before
    assert torch.equal(model(ids[:, :12]).logits, logits)


@torch.no_grad()
def test_after_an_exception_inside_a_forward_the_attached_model_goes_on(model):
    ids = tiny.random_ids(1, 40)

    def fail(*_):
        raise ZeroDivisionError

    with attach(model, POLICY):
        expected = model(ids).logits
        hook = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            model(ids)
        hook.remove()
        assert torch.equal(model(ids).logits, expected)


class Impossible(FullAttention):
    def resolve(self, training_length):
        raise ConfigurationError("not on this model")


def test_a_refused_attach_leaves_no_trace(model):
    before = fingerprint(model)
    with pytest.raises(ConfigurationError, match="not on this model"):
        attach(model, Impossible())
    assert fingerprint(model) == before


def test_a_step_that_fails_while_attaching_undoes_the_others(monkeypatch):
    model = tiny.build("llama")
    before = fingerprint(model)

    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(model.model, "register_forward_hook", fail)
    during = fingerprint(model)
    with pytest.raises(ZeroDivisionError):
        attach(model, POLICY)
    assert fingerprint(model) == during
    monkeypatch.undo()
    assert fingerprint(model) == before


def test_detach_twice_and_without_a_with_block():
    model = tiny.build("llama")
    before = fingerprint(model)
    handle = attach(model, POLICY)
    assert handle.is_attached
    handle.detach()
    handle.detach()
    assert not handle.is_attached
    assert fingerprint(model) == before


def test_a_function_the_user_put_in_generates_place_comes_back():
    model = tiny.build("llama")
    model._prepare_cache_for_generation = own = model._prepare_cache_for_generation
    with attach(model, POLICY):
        assert model._prepare_cache_for_generation is not own
    assert model._prepare_cache_for_generation is own


def test_training_flags_of_single_modules_survive_the_probe():
    model = tiny.build("llama").train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    with attach(model, POLICY):
        assert [m.training for m in model.modules() if "Rotary" not in type(m).__name__] == [
            flag for flag, m in zip(flags, model.modules(), strict=True) if "Rotary" not in type(m).__name__
        ]
    assert [module.training for module in model.modules()] == flags


@torch.no_grad()
def test_moving_the_model_while_attached_moves_what_comes_back():
    model, twin = tiny.build("llama"), tiny.build("llama").to(torch.bfloat16)
    ids = tiny.random_ids(1, 20)
    with attach(model, FullAttention()):
        model.to(torch.bfloat16)
        assert model(ids).logits.dtype == torch.bfloat16
    assert torch.equal(model(ids).logits, twin(ids).logits)


@torch.no_grad()
def test_our_cache_after_detach_is_refused_by_the_stock_model(model):
    ids = tiny.random_ids(1, 12)
    with attach(model, POLICY) as handle:
        used, fresh = tiny.cache_of(model(ids)), handle.new_cache()
    for cache in (used, fresh):
        with pytest.raises(StateError, match="detached"):
            model(ids, **tiny.cached(cache))
        longer = torch.cat((ids, ids), 1)
        with pytest.raises(StateError, match="detached"):
            model.generate(longer, **tiny.cached(cache), max_new_tokens=2, do_sample=False)


@torch.no_grad()
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_our_cache_left_half_done_is_refused_by_the_stock_model_too(error):
    model, ids = tiny.build("llama"), tiny.random_ids(1, 12)

    def fail(*_):
        raise error

    with attach(model, POLICY) as handle:
        cache = handle.new_cache()
        hook = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(error):
            model(ids, **tiny.cached(cache))
        hook.remove()
    with pytest.raises(StateError, match="detached"):
        model(ids, **tiny.cached(cache))


def test_an_attached_model_cannot_be_copied_or_pickled_and_its_state_dict_is_the_models_own():
    model = tiny.build("llama")
    names = list(model.state_dict())
    with attach(model, POLICY):
        assert list(model.state_dict()) == names
        for make in (copy.deepcopy, pickle.dumps):
            with pytest.raises(UnsupportedUseError, match="detach it first"):
                make(model)
    copy.deepcopy(model)
