"""Tiny random models of every supported family, and a byte tokenizer: offline, seeded, made in milliseconds.

The weights are larger than a usual initialisation, so that attention is peaked and a mistake of one position
shows in the logits; norms and biases, which start at one and zero, are disturbed for the same reason.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"

VOCAB = 97
TRAINING_LENGTH = 64
LOCAL_WINDOW = 8
BYTE_VOCAB = 259

_ALTERNATING: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": LOCAL_WINDOW,
}
_HALF_ROTARY: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
_TWO_TABLES: dict[str, Any] = {
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}

YARN: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": TRAINING_LENGTH,
    },
    "max_position_embeddings": 4 * TRAINING_LENGTH,
}
"""Overrides that give a model YaRN scaling: trained to 64 tokens, stretched to 256."""

_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "ministral": _ALTERNATING,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "phi": _HALF_ROTARY,
    "phi3": {"original_max_position_embeddings": TRAINING_LENGTH},
    "gemma2": {**_ALTERNATING, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    "gemma3_text": {
        **_TWO_TABLES,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": LOCAL_WINDOW,
        "query_pre_attn_scalar": 16,
    },
    # The last two layers share the keys of the first two.
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": LOCAL_WINDOW,
        "num_kv_shared_layers": 2,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
    },
    "gpt_oss": {**YARN, **_ALTERNATING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4": {},
    "olmo2": {},
    "olmo3": _ALTERNATING,
    "granite": {
        "attention_multiplier": 0.5,
        "residual_multiplier": 0.8,
        "embedding_multiplier": 2.0,
        "logits_scaling": 2.0,
    },
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": _HALF_ROTARY,
    "cohere2": {**_ALTERNATING, "logit_scale": 0.5},
    "exaone4": {**_ALTERNATING, "sliding_window_pattern": 2},
    "starcoder2": {},
    "gpt_neox": _HALF_ROTARY,
    # Scales its queries by their absolute position from the original length (64) on.
    "ministral3": {
        "rope_parameters": {
            **YARN["rope_parameters"],
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
        "max_position_embeddings": YARN["max_position_embeddings"],
    },
}

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
"""The transformers model types that `build` knows."""


def build(family: str, seed: int = 0, **config_overrides: Any) -> PreTrainedModel:
    """Build a tiny random model in eval mode, in float32.

    Parameters
    ----------
    family
        One of `FAMILIES`: two layers (gemma 3 three, gemma 4 four), four query heads over two key-value heads
        of eight dimensions, 97 tokens, trained to 64 positions, no end-of-text token.
    seed
        Same seed, same weights; the global random state is left alone.
    **config_overrides
        Configuration fields that replace the above.
    """
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": TRAINING_LENGTH,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family == "gpt_neox":
        del fields["num_key_value_heads"]
    fields |= _FAMILIES[family] | config_overrides
    config = AutoConfig.for_model(family, **copy.deepcopy(fields))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # glm4 replaces an absent one by its own
        setattr(config, name, fields[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make: Any = AutoModelForCausalLM.from_config
        model = make(config, dtype=torch.float32)
        _disturb(model)
    built: PreTrainedModel = model.eval()
    return built


def _disturb(model: PreTrainedModel) -> None:
    """Move norms and biases from one and zero, and sharpen attention where queries and keys are normed."""
    normed = {"q_norm", "k_norm", "q_layernorm", "k_layernorm"}
    if model.config.model_type == "gemma4_text":  # does not scale its attention logits down: sharp as it is
        normed = set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
            if normed & set(name.split(".")) and name.endswith("weight"):
                parameter.add_(0.8)


def random_ids(rows: int, length: int, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    """Random token ids (rows, length), from 3 up: none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (rows, length), generator=generator)


def left_padded(lengths: list[int], seed: int = 0, vocab: int = VOCAB) -> tuple[Tensor, Tensor]:
    """Random rows of these lengths, padded on the left with token 0: ids and mask, both (rows, longest)."""
    ids = random_ids(len(lengths), max(lengths), seed, vocab)
    place = torch.arange(max(lengths)).expand_as(ids)
    mask = (place >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def cached(cache: Any) -> dict[str, Any]:
    """Name a cache as this transformers does, for ``model(ids, **cached(cache))``."""
    return {CACHE_ARGUMENT: cache}


def cache_of(output: Any) -> Any:
    """Return the cache in the output of a forward or of ``generate()``."""
    return getattr(output, CACHE_ARGUMENT)


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "[{{ message['role'] }}]\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def byte_tokenizer(add_bos: bool = False) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose token ids are the bytes of the text, with <s> = 256, </s> = 257, <pad> = 258.

    Parameters
    ----------
    add_bos
        Whether encoding puts <s> before the text, as Llama's and Gemma's tokenizers do.
    """
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", "<pad>")])
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 256)]
        )
    make: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    return wrapped


def _byte_characters() -> list[str]:
    """List the characters that byte-level tokenizers write for the bytes, in the order of the bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def byte_llama(
    seed: int = 0, add_bos: bool = False, **config_overrides: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Build a tiny Llama that reads and writes bytes, with its tokenizer; its generation ends at </s>."""
    special = {"vocab_size": BYTE_VOCAB, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    return build("llama", seed, **(special | config_overrides)), byte_tokenizer(add_bos)
