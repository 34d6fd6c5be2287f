"""Lean layers: they give what the model's own code gives, and step aside wherever they could not."""

import contextlib
import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model

from everlong.attention import FullAttention, LMInfinite, attach
from everlong.models import lean_layers
from everlong.models.lean_layers import LeanLayer
from everlong.models.packed_weights import kernels_missing
from everlong.models.packing import pack
from tests import tiny

pytestmark = pytest.mark.skipif(kernels_missing() is not None, reason=str(kernels_missing()))
LEAN = ["llama", "mistral", "ministral", "qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3"]
OTHER = ["granite", "phi", "stablelm", "mixtral", "gemma4_text", "olmo2", "gpt_neox", "cohere2"]
STEPS = 30


@contextlib.contextmanager
def attached(model, kind="int8", policy=None):
    packing = None if kind == "float" else pack(model, kind)
    with attach(model, policy or LMInfinite(window=24, sinks=3)) as handle, torch.no_grad():
        yield handle
    if packing is not None:
        packing.undo()


@pytest.fixture
def ran(monkeypatch):
    """Numbers of the layers that ran lean, in order."""
    calls = []
    run = LeanLayer.run

    def noted(self, hidden_states, attend):
        if attend.__qualname__.startswith("Attachment"):
            calls.append(self.attention.layer_idx)
        return run(self, hidden_states, attend)

    monkeypatch.setattr(LeanLayer, "run", noted)
    return calls


def written(handle, rows=1, steps=STEPS):
    """Logits after each of some single tokens, behind a short text."""
    ids = tiny.random_ids(rows, 5 + steps)
    cache = handle.new_cache()
    handle.model(ids[:, :5], **tiny.cached(cache))
    return torch.cat(
        [handle.model(ids[:, at : at + 1], **tiny.cached(cache)).logits for at in range(5, 5 + steps)], 1
    )


def general(monkeypatch):
    """Let every layer run the model's own code."""
    monkeypatch.setattr("everlong.models.lean_layers._taken_apart", lambda layer: None)


def close(ours, expected, tolerance=2**-6):
    assert (ours - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("kind", ["float", "int8", "int4"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", LEAN)
def test_layers_of_the_usual_form_run_lean_and_give_the_same(family, rows, kind, ran, monkeypatch):
    model = tiny.build(family)
    with attached(model, kind) as handle:
        lean = written(handle, rows)
    layers = model.config.num_hidden_layers
    assert ran == list(range(layers)) * STEPS
    general(monkeypatch)
    with attached(model, kind) as handle:
        close(lean, written(handle, rows), 1e-5 if kind == "float" else 2**-6)
    assert len(ran) == layers * STEPS


def left_to_the_model(model, ran, monkeypatch, *, policy=None, steps=STEPS):
    """Assert that nothing of it ran lean, and that it made no difference that it might have."""
    with attached(model, policy=policy) as handle:
        ours = written(handle, steps=steps)
    assert not ran
    general(monkeypatch)
    with attached(model, policy=policy) as handle:
        assert torch.equal(ours, written(handle, steps=steps))


@pytest.mark.parametrize("family", OTHER)
def test_layers_of_another_form_are_left_to_the_model(family, ran, monkeypatch):
    left_to_the_model(tiny.build(family), ran, monkeypatch)


def test_names_alone_do_not_make_a_layer_lean(ran, monkeypatch):
    """A layer with the usual parts that does something else with them is left to its own code."""
    model = tiny.build("llama")
    kind = type(model.model.layers[0])
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, h, *a, **k: 1.1 * forward(self, h, *a, **k))
    left_to_the_model(model, ran, monkeypatch)


def test_layers_that_heed_positions_are_left_to_the_model(ran, monkeypatch):
    """ministral3 scales its queries from a position on that the first token is far from."""
    policy = LMInfinite(window=200)
    left_to_the_model(tiny.build("ministral3"), ran, monkeypatch, policy=policy, steps=100)


def test_models_in_bfloat16_run_lean_too(ran, monkeypatch):
    model = tiny.build("llama").to(torch.bfloat16)
    with attached(model) as handle:
        ours = written(handle).float()
    assert ran
    general(monkeypatch)
    with attached(model) as handle:
        expected = written(handle).float()
    assert (ours - expected).abs().max() <= 2**-3 * expected.abs().max()


def test_a_norm_of_another_kind_is_left_to_the_model(ran):
    model = tiny.build("llama")
    for layer in model.model.layers:
        size = len(layer.input_layernorm.weight)
        layer.input_layernorm = torch.nn.LayerNorm(size)
    with attached(model) as handle:
        written(handle)
    assert not ran


def test_autocast_takes_the_models_own_code(ran):
    model = tiny.build("llama")
    with torch.autocast("cpu", torch.bfloat16), attached(model) as handle:
        written(handle)
        assert not ran, "its norms would be rounded"
        with torch.autocast("cpu", enabled=False):
            written(handle)
        assert ran, "they were found nevertheless"


def test_several_tokens_and_gradients_take_the_models_own_code(ran):
    model = tiny.build("llama")
    with attached(model) as handle:
        model(tiny.random_ids(1, 5), **tiny.cached(handle.new_cache()))
        with torch.enable_grad():
            model(tiny.random_ids(1, 1), **tiny.cached(handle.new_cache()))
        assert not ran
        written(handle)
        assert ran


def test_hooks_on_parts_are_called(ran):
    model = tiny.build("llama")
    seen = []
    with attached(model) as handle:
        written(handle, steps=2)
        hook = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
        ran.clear()
        written(handle, steps=4)
        assert set(ran) == {1} and len(seen) == 5
        hook.remove()
        ran.clear()
        written(handle, steps=2)
        assert ran == [0, 1] * 2


def test_forwards_that_are_replaced_later_are_heeded(ran):
    model = tiny.build("llama")
    with attached(model) as handle:
        before = written(handle, steps=3)
        mlp = model.model.layers[1].mlp
        mlp.forward = lambda x: torch.zeros_like(x)
        ran.clear()
        assert not torch.allclose(before, written(handle, steps=3)) and set(ran) == {0}
        del mlp.forward
    with attached(model) as handle:
        attention = model.model.layers[0].self_attn
        attention.forward = functools.partial(attention.forward)
        ran.clear()
        close(written(handle, steps=3), before)
        assert set(ran) == {1}
        del attention.forward


def test_adapters_that_come_later_are_heeded(ran):
    model = tiny.build("llama")
    with attached(model) as handle:
        before = written(handle)
        ran.clear()
        config = LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[1], init_lora_weights=False)
        adapted = get_peft_model(model, config)
        after = written(handle)
        assert set(ran) == {0} and not torch.allclose(before, after)
        adapted.unload()
        ran.clear()
        close(written(handle), before)
        assert set(ran) == {0, 1}


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_norms_and_biases_are_read_as_they_are(family, ran, monkeypatch):
    model = tiny.build(family)
    with attached(model) as handle:
        before = written(handle)
        layer = model.model.layers[0]
        for weight in (layer.input_layernorm.weight, layer.self_attn.q_proj.bias):
            if weight is not None:
                weight.add_(0.5)
        ran.clear()
        lean = written(handle)
        assert ran and not torch.allclose(before, lean, atol=0.1)
        monkeypatch.setattr(LeanLayer, "_is_whole", lambda self: False)
        close(lean, written(handle))


def test_a_number_of_all_norms_is_a_plain_one_wherever_it_was_first_needed():
    with torch.inference_mode(), torch.device("meta"):
        number = lean_layers._number(0.12345)
    assert lean_layers._number(0.12345) is number and number == torch.tensor(0.12345)
    assert (number.device.type, number.dtype, number.is_inference()) == ("cpu", torch.float32, False)


def test_weights_that_are_packed_anew_or_no_longer_are_heeded(ran):
    model = tiny.build("llama")
    packing = pack(model, "int8")
    with attach(model, FullAttention()) as handle, torch.no_grad():
        before = written(handle)
        model.model.layers[1].mlp.up_proj.weight.mul_(3)
        again = pack(model, "int8")
        assert model.model.layers[0].self_attn.q_proj.__dict__["_everlong_product"][0].sizes == [32, 16, 16]
        ran.clear()
        after = written(handle)
        assert not ran and not torch.allclose(before, after)
        again.undo()
        packing.undo()
        plain = written(handle)
        assert (after - plain).abs().max() < (before - plain).abs().max() / 4


def test_it_leaves_no_trace_and_others_forwards_alone():
    model = tiny.build("llama")
    own = model.model.layers[1].forward
    model.model.layers[1].forward = own
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    with attached(model) as handle:
        written(handle)
        assert "forward" in model.model.layers[0].__dict__
        assert model.model.layers[1].__dict__["forward"] is own
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
