"""Logits of a stock transformers model under a method, by walking its layers one after the other.

Norms, projections, MLPs and the head are the model's own modules, called from here; rotation and attention
are the reference's. Nothing is patched, and a row is always computed alone, without its padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .attention import ReferenceSpec, Rotation, attend
from .kept import KeptSpec

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "phi", "stablelm", "gemma3_text")
"""Model types whose layers this walk knows."""

Attention = Callable[[Tensor], Tensor]
"""A layer's attention, from the normed hidden states (n, hidden) to what is added to them."""

_FIXED_FREQUENCIES = ("default", "linear", "llama3", "yarn")


@torch.no_grad()
def reference_logits(
    model: PreTrainedModel,
    input_ids: Tensor,
    spec: ReferenceSpec | KeptSpec,
    attention_mask: Tensor | None = None,
    offset: int = 0,
    edges: Sequence[int] | None = None,
) -> Tensor:
    """Logits at every position.

    Parameters
    ----------
    model
        A stock causal language model of a `SUPPORTED` type, in eval mode.
    input_ids
        (b, n) token ids.
    spec
        The method.
    attention_mask
        (b, n), ones on real tokens; padding is on the left.
    offset
        Position of each row's first real token.
    edges
        See `attend`: where groups of queries begin, counted from each row's first real token.

    Returns
    -------
    Tensor
        (b, n, vocabulary); NaN at padding, so that nobody compares it by mistake.

    Raises
    ------
    ValueError
        If the model type is not supported, or padding is not on the left, or a method that recalls for groups
        of queries finds no edges or edges that do not ascend from 0.
    """
    if model.config.model_type not in SUPPORTED:
        raise ValueError(f"the reference walks {', '.join(SUPPORTED)}, not {model.config.model_type}")
    rows, length = input_ids.shape
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    logits = torch.full((rows, length, model.config.vocab_size), float("nan"), dtype=model.dtype)
    for row in range(rows):
        start = length - int(mask[row].sum())
        if mask[row, :start].any():
            raise ValueError(f"padding of row {row} is not on the left")
        logits[row, start:] = _row_logits(model, input_ids[row, start:], spec, offset, edges)
    return logits


def _row_logits(
    model: PreTrainedModel,
    ids: Tensor,
    spec: ReferenceSpec | KeptSpec,
    offset: int,
    edges: Sequence[int] | None,
) -> Tensor:
    decoder: Any = model.model
    config: Any = model.config
    hidden = decoder.embed_tokens(ids)
    before: dict[int, tuple[int, list[list[int]]]] = {}
    for index, layer in enumerate(decoder.layers):
        attention = functools.partial(
            _attention,
            layer.self_attn,
            rotation=_rotation(decoder.rotary_emb, config, index),
            spec=spec,
            index=index,
            sliding=_sliding_width(config, index),
            offset=offset,
            edges=edges,
            before=before,
        )
        if config.model_type == "gemma3_text":
            hidden = _sandwich_layer(layer, hidden, attention)
        elif config.model_type == "phi" or getattr(config, "use_parallel_residual", False):
            hidden = _parallel_layer(layer, hidden, attention)
        else:
            hidden = _sequential_layer(layer, hidden, attention)
    hidden = decoder.final_layernorm(hidden) if config.model_type == "phi" else decoder.norm(hidden)
    logits: Tensor = model.lm_head(hidden)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _sequential_layer(layer: Any, x: Tensor, attention: Attention) -> Tensor:
    x = x + attention(layer.input_layernorm(x))
    x = x + layer.mlp(layer.post_attention_layernorm(x))
    return x


def _parallel_layer(layer: Any, x: Tensor, attention: Attention) -> Tensor:
    normed = layer.input_layernorm(x)
    x = x + attention(normed) + layer.mlp(normed)
    return x


def _sandwich_layer(layer: Any, x: Tensor, attention: Attention) -> Tensor:
    x = x + layer.post_attention_layernorm(attention(layer.input_layernorm(x)))
    x = x + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(x)))
    return x


def _attention(
    attn: Any,
    x: Tensor,
    rotation: Rotation,
    spec: ReferenceSpec | KeptSpec,
    index: int,
    sliding: int | None,
    offset: int,
    edges: Sequence[int] | None,
    before: dict[int, tuple[int, list[list[int]]]],
) -> Tensor:
    """Project, attend and project back: x (n, hidden) to (n, hidden)."""
    length = len(x)
    query, key, value = (
        projection(x).view(1, length, -1, attn.head_dim).transpose(1, 2)
        for projection in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    if hasattr(attn, "q_norm"):
        query, key = attn.q_norm(query), attn.k_norm(key)
    if getattr(attn, "qk_layernorm", False):
        query, key = attn.q_layernorm(query), attn.k_layernorm(key)
    row = query[0], key[0], value[0], rotation, attn.scaling
    if isinstance(spec, KeptSpec):
        own = ReferenceSpec()  # a local layer keeps to its own rule
        mixed = spec.attend(*row, index) if sliding is None else attend(*row, own, index, sliding, offset)
    else:
        mixed = attend(*row, spec, index, sliding, offset, edges, before)
    joined = mixed.to(x.dtype).transpose(0, 1).reshape(length, -1)
    output: Tensor = attn.dense(joined) if hasattr(attn, "dense") else attn.o_proj(joined)
    return output


def _sliding_width(config: Any, index: int) -> int | None:
    """The width of a local layer; None where the layer sees everything."""
    types = getattr(config, "layer_types", None)
    local = config.model_type == "mistral" or (types is not None and types[index] == "sliding_attention")
    return config.sliding_window if local else None


def _rotation(rotary: Any, config: Any, index: int) -> Rotation:
    """The model's own frequencies and attention scaling for one layer."""
    kind, prefix = rotary.rope_type, ""
    if isinstance(kind, dict):  # one table for each type of layer
        kind, prefix = kind[config.layer_types[index]], f"{config.layer_types[index]}_"
    if kind not in _FIXED_FREQUENCIES:
        raise ValueError(f"the reference has no rotary scaling of type {kind!r}")
    inv_freq: Tensor = getattr(rotary, f"{prefix}inv_freq")
    return Rotation(inv_freq.double(), float(getattr(rotary, f"{prefix}attention_scaling")))
