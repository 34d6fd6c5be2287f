"""What vLLM would say to an adapter, without vLLM."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import tests.tiny as tiny
from everlong.memory.compatible import check_vllm, lora_key
from everlong.memory.folder import write_memory
from tests.memory.adapters import lora, record


@pytest.fixture
def folder(tmp_path):
    """A memory's files."""
    write_memory(tmp_path, record(), lora(), [])
    return tmp_path


def configured(folder, **options):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def weighted(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def test_a_memory_is_served_as_it_is(folder):
    assert check_vllm(folder, "tiny") == ()
    assert check_vllm(folder, "tiny", tiny.build("llama")) == ()


def test_the_base_model_is_compared_letter_by_letter(folder):
    assert check_vllm(folder, "Tiny") == ("it belongs to the base model 'tiny', not 'Tiny'",)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"peft_type": "LOHA"}, "of type LOHA"),
        ({"r": 12}, "rank is 12, not one of 8, 16, 32, 64, 128"),
        ({"r": 16}, "are not of rank 16"),
        ({"bias": "lora_only"}, "biases"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alpha_pattern": {"v_proj": 3}}, "alpha_pattern"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model's weights"),
    ],
    ids=str,
)
def test_configurations_it_does_not_follow(folder, options, reason):
    configured(folder, **options)
    assert any(reason in problem for problem in check_vllm(folder, "tiny"))


@pytest.mark.parametrize(
    "name", ["lora_magnitude_vector.weight", "lora_A.default.weight", "lora_B.bias", "weight"]
)
def test_weights_it_does_not_know(folder, name):
    key = f"base_model.model.model.layers.0.self_attn.q_proj.{name}"
    weighted(folder, lambda tensors: {**tensors, key: torch.ones(8)})
    assert f"its weight {key!r} is none" in check_vllm(folder, "tiny")[0]


def test_embeddings_and_heads_are_not_linear_layers(folder):
    more = {"base_model.model.lm_head.lora_A.weight": torch.ones(8, 32)}
    more["base_model.model.lm_head.lora_B.weight"] = torch.ones(97, 8)
    weighted(folder, lambda tensors: {**tensors, **more})
    assert "lm_head" in check_vllm(folder, "tiny")[0]


def test_half_a_pair_of_matrices_and_none_at_all(folder):
    weighted(folder, lambda tensors: {key: tensors[key] for key in list(tensors)[1:]})
    assert "are not of rank 8" in check_vllm(folder, "tiny")[0]
    weighted(folder, lambda _: {})
    assert check_vllm(folder, "tiny") == ("it has no weights",)


def test_modules_that_the_model_does_not_have_or_of_another_shape(folder):
    smaller = tiny.build("llama", intermediate_size=24)
    assert "up_proj" in check_vllm(folder, "tiny", smaller)[0]
    shallow = tiny.build("llama", num_hidden_layers=1)
    assert "layers.1.mlp.up_proj is no module" in " ".join(check_vllm(folder, "tiny", shallow))
    odd = tiny.build("llama")
    odd.model.layers[0].self_attn.q_proj = torch.nn.Identity()
    assert "q_proj is Identity" in check_vllm(folder, "tiny", odd)[0]


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_that_cannot_be_read(folder, name):
    (folder / name).write_bytes(b"no")
    assert "cannot be read" in check_vllm(folder, "tiny")[0]
    (folder / name).unlink()
    assert "cannot be read" in check_vllm(folder, "tiny")[0]


def test_saved_names_are_split_into_module_and_part():
    assert lora_key("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight") == (
        *("model.layers.0.mlp.up_proj", "lora_B"),
    )
    assert lora_key("model.layers.0.mlp.up_proj.lora_B.weight") is None


def test_rank_stabilised_scaling_is_fine(folder):
    adapter = lora(use_rslora=True)
    write_memory(folder, record(), dataclasses.replace(adapter), [])
    assert check_vllm(folder, "tiny") == ()
