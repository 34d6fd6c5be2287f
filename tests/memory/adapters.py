"""Tiny adapters with strong random weights, what a model says with them, and what a store holds."""

from __future__ import annotations

import peft
import torch
from peft import get_peft_model_state_dict

import tests.tiny as tiny
from everlong.memory.adapter import Adapter
from everlong.memory.pairs import Pair
from everlong.memory.record import MemoryRecord, Recipe, Source

TARGETS = ["q_proj", "v_proj", "up_proj"]
PAIRS = [
    Pair("Who keeps the bees?", " Orla Finch", "questions", 0, (0,), 1.5),
    Pair("", "Of bees.", "recite"),
]
IDS = tiny.random_ids(2, 12)


def lora(seed: int = 0, targets: list[str] | str = TARGETS, r: int = 8, **options) -> Adapter:
    """Make an adapter for ``tests.tiny.build("llama")``."""
    return adapter_of(tiny.build("llama"), seed, targets, r, **options)


def adapter_of(model, seed: int = 0, targets: list[str] | str = TARGETS, r: int = 8, **options) -> Adapter:
    """Make an adapter for any model, which stays as it is."""
    config = peft.LoraConfig(
        r=r, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **options
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, config)
    tensors = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(adapted).items()}
    adapted.unload()
    return Adapter(config, tensors)


def logits_with(adapter: Adapter) -> torch.Tensor:
    """What PEFT makes of an adapter."""
    model = peft.get_peft_model(tiny.build("llama"), adapter.config).eval()
    result = peft.set_peft_model_state_dict(model, dict(adapter.tensors))
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora_" in key]
    with torch.no_grad():
        return model(IDS).logits


def logits_with_deltas(adapters: list[Adapter], weights: list[float]) -> torch.Tensor:
    """The slow way: add w · scaling · B A to each layer's own weights."""
    model = tiny.build("llama")
    modules = dict(model.named_modules())
    with torch.no_grad():
        for adapter, weight in zip(adapters, weights, strict=True):
            config = adapter.config
            scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
            for key, lower in adapter.tensors.items():
                if ".lora_A." in key:
                    upper = adapter.tensors[key.replace("lora_A", "lora_B")]
                    module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                    modules[module].weight += weight * scaling * upper.float() @ lower.float()
        return model(IDS).logits


def record(name: str = "handbook", **changes) -> MemoryRecord:
    values = {
        "base_model": "tiny",
        "base_hash": "0" * 64,
        "source": Source.of("Orla keeps the bees.", 20),
        "segments": 1,
        "recipe": Recipe("infinite-icl", {"rate": 0.001, "passes": [4, 8]}),
        "rank": 8,
        "recall": {"questions": 0.8},
        "seconds": 12.5,
    }
    return MemoryRecord(name, **{**values, **changes})


def content(folder):
    """Every file below a folder, byte for byte, but for the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
