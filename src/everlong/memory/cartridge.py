"""Cartridges: a memory as keys and values that every stream begins with (arXiv 2506.06266), PEFT's kind.

Trained by the same loop and loss as an adapter of weights; they begin as those of the source's first tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from everlong.attention import FullAttention, StreamCache
from everlong.attention.prefix import Prefix
from everlong.errors import UnsupportedUseError
from everlong.memory.forest import read_past
from everlong.reading.attached import AttachedModel

WEIGHTS = "prompt_embeddings"
"""What PEFT calls the weights it saves, shape (tokens, 2 x layers x key-value heads x d)."""
_FROZEN = 1  # first tokens that stay as they are: what attention rests on


def first_keys(model: AttachedModel, text: str, tokens: int) -> Tensor:
    """Return keys and values of the first tokens of a text, fewer if it has fewer, as PEFT lays them out.

    Raises
    ------
    UnsupportedUseError
        The model's layers do not all keep keys of their own, of one shape, that far.
    """
    coder = model.coder
    past = read_past(model, [*coder.bos, *coder.encode(text)][:tokens])
    memories = [past.memories[number] for number in sorted(past.memories)]
    windows = [memory.window for memory in memories if memory.window is not None]
    if min(windows, default=past.seen) < past.seen:
        raise UnsupportedUseError(
            f"{model.name} has layers that see {min(windows)} tokens: use prefix={min(windows)} or less"
        )
    held = [m.ordered(part)[0] for m in memories for part in (m.keys, m.values) if part is not None]
    if len(held) != 2 * _layers(model) or len({part.shape for part in held}) != 1:
        raise UnsupportedUseError(
            f"{model.name} shares keys between layers, or has layers of several shapes, which PEFT's "
            "cartridges do not fit: use the recipe 'infinite-icl'"
        )
    return torch.stack(held).permute(2, 0, 1, 3).reshape(past.seen, -1).float().cpu()


def config_of(model: AttachedModel, tokens: int) -> Any:
    """Return PEFT's configuration of a cartridge of so many tokens."""
    from peft import CartridgeConfig

    return CartridgeConfig(
        num_virtual_tokens=tokens,
        num_frozen_tokens=min(_FROZEN, tokens - 1),
        num_transformer_submodules=1,
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name,
    )


def prefix_of(model: AttachedModel, weights: Tensor) -> Prefix:
    """Return keys and values by layer, from weights as PEFT lays them out; gradients flow through."""
    inner: Any = model.attachment.model
    parts = weights.to(inner.device, inner.dtype).view(len(weights), 2 * _layers(model), _heads(model), -1)
    parts = parts.permute(1, 2, 0, 3)[:, None]
    return {layer: (parts[2 * layer], parts[2 * layer + 1]) for layer in range(_layers(model))}


def past_of(model: AttachedModel, weights: Tensor) -> StreamCache:
    """Return what a student's texts begin behind."""
    return model.attachment.new_cache(FullAttention(), prefix=prefix_of(model, weights))


def _layers(model: AttachedModel) -> int:
    config: Any = model.attachment.model.config
    return int(config.get_text_config().num_hidden_layers)


def _heads(model: AttachedModel) -> int:
    config: Any = model.attachment.model.config
    text = config.get_text_config()
    return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
