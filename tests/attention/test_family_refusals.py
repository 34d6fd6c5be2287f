"""Models that cannot be driven are refused by name, and the message says what is missing."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import tests.tiny as tiny
from everlong.attention import LMInfinite, attach
from everlong.errors import ConfigurationError, UnsupportedModelError

POLICY = LMInfinite(window=24, sinks=3)
_SMALL = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_HF = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = {**_HF, "num_key_value_heads": 2, "head_dim": 8}
_GPT = {"n_embd": 32, "n_head": 4, "n_layer": 2}
_LATENT = {
    **_HF, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1,
}  # fmt: skip

CAUSAL = {
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, "ALiBi"),
    "bloom": ({"hidden_size": 32, "n_head": 4, "n_layer": 2}, "ALiBi"),
    "falcon": (_HF, "attention interface"),
    "gptj": ({**_GPT, "rotary_dim": 4}, "attention interface"),
    "gpt2": (_GPT, "learned absolute positions"),
    "opt": ({**_HF, "ffn_dim": 48, "word_embed_proj_dim": 32}, "learned absolute positions"),
    "bert": ({**_HF, "is_decoder": True}, "learned absolute positions"),
    "ctrl": ({**_GPT, "dff": 48}, "positions reach its keys by another way than rotary tables"),
    "deepseek_v2": (_LATENT, "multi-head latent attention"),
    "deepseek_v3": (_LATENT, "multi-head latent attention"),
    "llama4_text": (
        {**_GROUPED, "intermediate_size_mlp": 48, "num_local_experts": 2},
        "chunked local attention",
    ),
    "qwen3_next": ({**_GROUPED, "num_hidden_layers": 4, "num_experts": 2}, "layers of type linear_attention"),
    "lfm2": ({**_GROUPED, "layer_types": ["conv", "full_attention"]}, "layers of type conv"),
    "mamba": ({"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, "linear_attention|0 of 2 layers"),
    "rwkv": ({"hidden_size": 32, "num_hidden_layers": 2}, "0 of 2 layers"),
    "diffllama": (_GROUPED, "attend more than once"),
    "nanochat": (_HF, "none of the model's rotary tables"),
}


def build(family, fields, auto=AutoModelForCausalLM):
    config = AutoConfig.for_model(family, **{**_SMALL, **fields})
    torch.manual_seed(0)
    return auto.from_config(config).eval()


@pytest.mark.parametrize("family", CAUSAL)
def test_causal_models_that_cannot_follow_a_policy(family):
    fields, reason = CAUSAL[family]
    model = build(family, fields)
    with pytest.raises(UnsupportedModelError, match=reason) as refused:
        attach(model, POLICY)
    assert type(model).__name__ in str(refused.value)
    assert "_prepare_cache_for_generation" not in vars(model)


@pytest.mark.parametrize("family", ["mpt", "gpt2", "deepseek_v3", "qwen3_next"])
def test_the_reason_does_not_need_weights(family):
    with torch.device("meta"):
        model = build(family, CAUSAL[family][0])
    with pytest.raises(UnsupportedModelError, match=CAUSAL[family][1]):
        attach(model, POLICY)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders(family):
    small = {
        "t5": {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4},
        "bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
                 "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
    }[family]  # fmt: skip
    model = build(family, small, AutoModelForSeq2SeqLM)
    with pytest.raises(UnsupportedModelError, match=f"{type(model).__name__}.*encoder-decoder"):
        attach(model, POLICY)


def test_attention_that_looks_ahead():
    model = tiny.build("llama")
    model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM.*not causal"):
        attach(model, POLICY)


def test_a_model_without_weights():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny.build("llama").config)
    with pytest.raises(UnsupportedModelError, match="meta device"):
        attach(model, POLICY)


def test_what_is_not_a_transformers_model():
    with pytest.raises(UnsupportedModelError, match="Linear is not a transformers model"):
        attach(torch.nn.Linear(2, 2), POLICY)


@pytest.mark.parametrize("policy", [None, "lm-infinite", LMInfinite], ids=["none", "a name", "a class"])
def test_what_is_not_a_policy(policy):
    with pytest.raises(ConfigurationError, match="make_policy"):
        attach(tiny.build("llama"), policy)


# --- wrapped models -----------------------------------------------------------------------------------


def _wrap(model):
    return torch.compile(model, backend="eager")


def _compile_in_place(model):
    model.compile(backend="eager")
    return model


def _compile_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def _compile_decoder(model):
    model.model = torch.compile(model.model, backend="eager")
    return model


def _compile_one_layer(model):
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return model


@pytest.mark.parametrize(
    "make", [_wrap, _compile_in_place, _compile_forward, _compile_decoder, _compile_one_layer]
)
def test_compiled_models(make):
    with pytest.raises(UnsupportedModelError, match=r"torch\.compile"):
        attach(make(tiny.build("llama")), POLICY)


def _dispatch(model):
    from accelerate import dispatch_model

    return dispatch_model(model, {name: "cpu" for name, _ in _parts(model)}, force_hooks=True)


def _offload(model):
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=torch.device("cpu"))


def _parts(model):
    yield from (("lm_head", None), *((f"model.{name}", part) for name, part in model.model.named_children()))


@torch.no_grad()
@pytest.mark.parametrize("make", [_dispatch, _offload])
def test_models_that_accelerate_has_placed_work(make):
    ids = tiny.random_ids(2, 40)
    with attach(tiny.build("llama"), POLICY) as plain:
        expected = plain.model.generate(ids, max_new_tokens=5, do_sample=False)
    placed = make(tiny.build("llama"))
    stock = placed(ids).logits
    with attach(placed, POLICY):
        assert torch.equal(placed.generate(ids, max_new_tokens=5, do_sample=False), expected)
    assert torch.equal(placed(ids).logits, stock)


@torch.no_grad()
def test_a_model_loaded_with_a_device_map_works(tmp_path):
    tiny.build("llama").save_pretrained(tmp_path)
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu"), tiny.random_ids(2, 40)
    with attach(tiny.build("llama"), POLICY) as plain, attach(model, POLICY):
        torch.testing.assert_close(model(ids).logits, plain.model(ids).logits)
