"""Packed weights: what they stand for, when they are used, and that they leave no trace."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from everlong.attention import FullAttention, LMInfinite, attach
from everlong.errors import ConfigurationError, UnknownNameError, UnsupportedUseError
from everlong.llm import LLM, load
from everlong.models import packing, placement
from everlong.models.packed_weights import Half, Int4, Int8, kernels_missing
from everlong.models.packing import MOST_ROWS, PackedLinear, bytes_of, choose_weights, pack
from tests import tiny

pytestmark = pytest.mark.skipif(kernels_missing() is not None, reason=str(kernels_missing()))
KINDS = (Half, Int8, Int4)


def weight_of(out, size, seed=0):
    return torch.randn(out, size, generator=torch.Generator().manual_seed(seed))


def product_of(layer, x):
    """What `layer` makes of `x`, shape (n, in), by the weights it stands for and the kernel's rounding."""
    product, which = layer.__dict__["_everlong_product"]
    start = sum(product.sizes[:which])
    return product.packed(x)[:, start : start + layer.out_features]


def linear_layers(model):
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def q4_1(out, size):
    """Weights as GGUF's Q4_1 stores them: numbers from 0 to 15, both among them, a scale, a least weight."""
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randint(0, 16, (out, size // 32, 32), generator=generator).float()
    numbers[..., 3], numbers[..., 7] = 0, 15
    scales, least = (torch.rand(out, size // 32, 1, generator=generator).half().float() for _ in range(2))
    return (numbers * scales - least).reshape(out, size)


# --- one weight --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5])
def test_the_product_is_with_the_weights_it_stands_for(kind, rows):
    packed, x = kind(weight_of(48, 64)), weight_of(rows, 64, seed=2)
    rounding = 1e-5 if kind is Half else 2**-7  # activations and results in bfloat16
    expected = x @ packed.restored().T
    assert (packed(x) - expected).abs().max() < rounding * (x.abs() @ packed.restored().abs().T).max()


@pytest.mark.parametrize(
    "kind, steps", [(Half, 2**11), (Int8, 2 * 127), (Int4, 2 * 15)], ids=["half", "int8", "int4"]
)
def test_no_weight_is_off_by_more_than_half_a_step(kind, steps):
    weight = weight_of(48, 64)
    groups = {Half: weight.abs(), Int8: weight.abs().amax(1, True)}.get(kind)
    if groups is None:
        spans = weight.reshape(48, 2, 32)
        groups = (spans.amax(-1) - spans.amin(-1)).repeat_interleave(32, 1)
    rounding = 2**-7 * weight.abs() + 2**-8 * groups if kind is Int4 else 1e-6
    assert ((kind(weight).restored() - weight).abs() <= groups / steps * 1.01 + rounding).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_are_those_announced(kind):
    weight = weight_of(48, 64)
    assert kind(weight).nbytes == kind.bytes_for(weight)


def test_weights_that_came_in_four_bits_get_their_own_values_again():
    weight = q4_1(32, 64)
    assert Int4.loss(weight) < 1e-6 < 1e-2 < Int4.loss(weight_of(32, 64))
    spans = weight.reshape(32, 2, 32).amax(-1) - weight.reshape(32, 2, 32).amin(-1)
    error = (Int4(weight).restored() - weight).abs().reshape(32, 2, 32).amax(-1)
    assert (error < 2**-7 * (spans + weight.abs().max())).all()


# --- a model -----------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return tiny.byte_llama()[0]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_few_rows_take_the_packed_weights_and_many_the_float_ones(model, kind):
    pack(model, kind)
    layer = model.model.layers[0].self_attn.q_proj
    few, many = weight_of(MOST_ROWS, 32), weight_of(MOST_ROWS + 1, 32)
    with torch.no_grad():
        assert torch.equal(layer(few), product_of(layer, few))
        assert not torch.equal(layer(few), F.linear(few, layer.weight))
        assert torch.equal(layer(few[None, :, None]), product_of(layer, few)[None, :, None])
        assert torch.equal(layer(many), F.linear(many, layer.weight))
    assert torch.equal(layer(few), F.linear(few, layer.weight)), "with gradients, the float weights"


def test_a_bias_is_added():
    model = tiny.build("qwen2")
    pack(model, "int8")
    layer, x = model.model.layers[0].self_attn.q_proj, weight_of(3, 32)
    with torch.no_grad():
        assert torch.equal(layer(x), product_of(layer, x) + layer.bias)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_packing_counts_its_bytes_and_undoing_leaves_no_trace(model, kind):
    before = {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()}
    weights, announced = copy.deepcopy(model.state_dict()), bytes_of(model, kind)
    made = pack(model, kind)
    products = {layer.__dict__["_everlong_product"][0] for layer in linear_layers(model)}
    assert made.nbytes == announced == sum(product.packed.nbytes for product in products)
    assert made.kind == kind
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {PackedLinear}
    assert all(torch.equal(weights[name], held) for name, held in model.state_dict().items())
    made.undo()
    made.undo()
    assert {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()} == before


def test_shapes_that_four_bits_do_not_fit_get_eight(model):
    pack(model, "int4")
    mlp = model.model.layers[0].mlp
    layers = mlp.up_proj, mlp.down_proj, model.lm_head
    kinds = [type(layer.__dict__["_everlong_product"][0].packed) for layer in layers]
    assert kinds == [Int4, Int8, Half]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_layers_with_one_input_are_multiplied_together(model, kind):
    pack(model, kind)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    together = [
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (mlp.gate_proj, mlp.up_proj),
        (attention.o_proj,),
        (mlp.down_proj,),
        (model.lm_head,),
    ]
    for layers in together:
        products = [layer.__dict__["_everlong_product"] for layer in layers]
        assert {id(product) for product, _ in products} == {id(products[0][0])}
        assert [which for _, which in products] == list(range(len(layers)))
        assert products[0][0].sizes == [layer.out_features for layer in layers]


def test_a_product_is_made_once_for_an_input_and_never_taken_for_another(model):
    pack(model, "int8")
    attention = model.model.layers[0].self_attn
    first, second = weight_of(3, 32, seed=4), weight_of(3, 32, seed=5)
    product, _ = attention.q_proj.__dict__["_everlong_product"]
    made = []
    packed = product.packed
    product._packed = lambda rows: (made.append(rows), packed(rows))[1]
    names = ("q_proj", "k_proj", "v_proj")

    def expected(name, x):
        product._packed = packed
        right = product_of(getattr(attention, name), x)
        product._packed = lambda rows: (made.append(rows), packed(rows))[1]
        return right

    with torch.no_grad():
        for name in names:
            assert torch.equal(getattr(attention, name)(first), expected(name, first))
        assert len(made) == 1
        # Two threads take turns.
        for name, x in zip(names * 2, [first, second] * 3, strict=True):
            assert torch.equal(getattr(attention, name)(x), expected(name, x))
        # The same tensor with other content: asked again, a layer does not give what it gave before.
        attention.k_proj(first)
        first.copy_(second)
        assert torch.equal(attention.k_proj(first), expected("k_proj", second))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_shapes_that_no_kernel_fits_stay_as_they_are(kind):
    model = tiny.build("llama", intermediate_size=40)
    pack(model, kind)
    mlp = model.model.layers[0].mlp
    assert type(mlp.down_proj) is nn.Linear and type(mlp.up_proj) is PackedLinear
    with torch.no_grad():
        assert model(torch.zeros((1, 1), dtype=torch.long)).logits.isfinite().all()


def test_adapters_go_on_top_also_one_per_row(model):
    pack(model, "int8")
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config, adapter_name="one")
    adapted.add_adapter("two", config)
    wrapped = model.model.layers[0].self_attn.q_proj
    x = weight_of(2, 32).reshape(2, 1, 32)
    with torch.no_grad():
        plain = product_of(wrapped.base_layer, x.reshape(2, 32)).reshape(2, 1, 32)
        for row, name in enumerate(("one", "two")):
            a, b = wrapped.lora_A[name].weight, wrapped.lora_B[name].weight
            expected = plain[row] + x[row] @ a.T @ b.T * wrapped.scaling[name]
            adapted.set_adapter(name)
            torch.testing.assert_close(wrapped(x)[row], expected)
            torch.testing.assert_close(wrapped(x, adapter_names=["one", "two"])[row], expected)


def test_adapters_themselves_are_not_packed_and_a_wrapped_head_is_still_one(model):
    config = LoraConfig(r=16, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    pack(adapted, "int4")
    kinds = {name: type(m) for name, m in adapted.named_modules() if isinstance(m, nn.Linear)}
    assert {kind for name, kind in kinds.items() if "lora_" in name} == {nn.Linear}
    assert isinstance(model.lm_head.base_layer.__dict__["_everlong_product"][0].packed, Half)


def test_weights_are_packed_when_they_are_first_used(model):
    pack(model, "int4")
    products = {layer.__dict__["_everlong_product"][0] for layer in linear_layers(model)}
    with torch.no_grad():
        model(torch.zeros((1, MOST_ROWS + 1), dtype=torch.long))
        assert all(product._packed is None for product in products), "many rows take the float weights"
        model(torch.zeros((1, 1), dtype=torch.long))
    assert all(product._packed is not None for product in products)


def test_threads_that_write_at_once_pack_once(model, monkeypatch):
    packed = []

    class Noted(Int8):
        def __init__(self, *weights):
            packed.append(weights)
            super().__init__(*weights)

    monkeypatch.setitem(packing._KINDS, "int8", Noted)
    pack(model, "int8")
    products = {layer.__dict__["_everlong_product"][0] for layer in linear_layers(model)}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda product: product.packed, [*products] * 20))
    assert len(set(found)) == len(products) and len(packed) == len(products) - 1, "the head is in float16"


def test_packing_that_is_interrupted_is_done_by_the_next_forward(model, monkeypatch):
    calls = []

    class Interrupted(Int8):
        def __init__(self, *weights):
            calls.append(weights)
            if len(calls) == 3:
                raise KeyboardInterrupt
            super().__init__(*weights)

    reference, token = copy.deepcopy(model), torch.ones((1, 1), dtype=torch.long)
    pack(reference, "int8")
    monkeypatch.setitem(packing._KINDS, "int8", Interrupted)
    made = pack(model, "int8")
    with torch.no_grad():
        with pytest.raises(KeyboardInterrupt):
            model(token)
        assert torch.equal(model(token).logits, reference(token).logits)
    made.undo()
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}


def test_looking_for_layers_with_one_input_leaves_no_trace(model):
    model.lm_head.forward = own = lambda x: F.linear(x, model.lm_head.weight)
    before = {name: set(m.__dict__) for name, m in model.named_modules()}
    pack(model, "int8").undo()
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == before
    assert model.lm_head.__dict__["forward"] is own


@pytest.mark.parametrize("kind", KINDS)
def test_weights_below_one_another_are_packed_as_each_alone(kind):
    weights, x = [weight_of(out, 64, seed=out) for out in (16, 48, 5)], weight_of(3, 64, seed=2)
    weights = weights[: 2 if kind is Int4 else 3]
    assert torch.equal(kind(*weights).restored(), torch.cat([kind(weight).restored() for weight in weights]))
    assert torch.equal(kind(*weights)(x), torch.cat([kind(weight)(x) for weight in weights], -1))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_can_be_attached_when_it_is_packed(family):
    model = tiny.build(family)
    pack(model, "int8")
    with attach(model, FullAttention()), torch.no_grad():
        model(torch.zeros((1, 1), dtype=torch.long))


# --- which ------------------------------------------------------------------------------------------


def big(weights):
    model = tiny.byte_llama()[0]
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and Int4.fits(layer.weight):
                layer.weight.copy_(weights(*layer.weight.shape))
    return model


def test_auto_is_float_for_small_models_and_packed_for_others(monkeypatch):
    assert choose_weights(big(weight_of), "auto") == "float"
    monkeypatch.setattr(packing, "_WORTH_IT", 1000)
    assert choose_weights(big(weight_of), "auto") == "int8"
    assert choose_weights(big(q4_1), "auto") == "int4"
    odd = tiny.build("llama", hidden_size=40, intermediate_size=56)
    assert choose_weights(odd, "auto") == "int8", "no layer fits 4 bits"
    monkeypatch.setattr(packing, "_available", lambda: 1000)
    assert choose_weights(big(q4_1), "auto") == "float"
    monkeypatch.setattr(packing, "_available", lambda: 10**9)
    monkeypatch.setattr(packing, "kernels_missing", lambda: "no kernels")
    assert choose_weights(big(q4_1), "auto") == "float"


def test_the_memory_that_is_available_is_what_the_system_says_or_half_of_it(tmp_path, monkeypatch):
    assert 2**20 < packing._available() < 2**50
    meminfo, cpu = tmp_path / "meminfo", torch.device("cpu")
    monkeypatch.setattr(placement, "_MEMORY", meminfo)
    assert placement.available_bytes(cpu) is None
    assert packing._available() > 2**20
    meminfo.write_text("MemTotal:   9 kB\nMemAvailable:       7 kB\n")
    assert placement.available_bytes(cpu) == packing._available() == 7 * 1024
    assert placement.available_bytes(torch.device("meta")) is None


def test_what_cannot_be_packed_is_refused(model, monkeypatch):
    with pytest.raises(UnknownNameError, match="did you mean 'int8' or 'int4'"):
        choose_weights(model, "int6")
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_available", lambda: 1000)
        with pytest.raises(ConfigurationError, match="weights='int8' needs .* and 1.0 kB are available"):
            pack(model, "int8")
        patch.setattr(packing, "kernels_missing", lambda: "no kernels")
        with pytest.raises(UnsupportedUseError, match="no kernels; use 'float'"):
            pack(model, "int8")
    with pytest.raises(UnsupportedUseError, match="no linear layers on the CPU"):
        pack(model.to(torch.float64), "int8")


# --- sessions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_session_writes_what_the_packed_model_would(kind):
    model, tokenizer = tiny.byte_llama()
    reference, _ = tiny.byte_llama()
    pack(reference, kind)
    with LLM(model, tokenizer, "tiny", FullAttention(), weights=kind) as llm:
        assert llm.weights == kind
        session = llm.session()
        session.read(tiny.random_ids(1, 30)[0])
        session.generate(10)
        driver = session._tape.driver
        with torch.inference_mode():
            expected = reference(torch.tensor([list(driver.recent)]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(driver.logits, expected, atol=0.02, rtol=0)
    assert all(type(m) is not PackedLinear for m in model.modules())


def test_a_saved_session_says_so_when_it_goes_on_with_other_weights(tmp_path):
    model, tokenizer = tiny.byte_llama()
    policy = LMInfinite(window=40)
    with load(model, policy, tokenizer=tokenizer, weights="int8") as llm:
        session = llm.session()
        session.read("Once upon a time")
        session.save(tmp_path / "state")
        llm.restore(tmp_path / "state")
    with (
        load(model, policy, tokenizer=tokenizer, weights="float") as llm,
        pytest.warns(UserWarning, match="written with weights='int8' and goes on with 'float'"),
    ):
        llm.restore(tmp_path / "state")


@pytest.mark.model
def test_the_default_model_is_packed_in_the_four_bits_it_came_in():
    with load("smollm2-135m", device="cpu") as llm:
        assert llm.weights == "int4"
        layer = llm.model.model.layers[3].mlp.up_proj
        assert Int4.loss(layer.weight.detach()) < 1e-6
