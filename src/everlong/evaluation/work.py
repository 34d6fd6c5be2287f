"""What a forward of a model has to do: numbers multiplied, and bytes read. Counted, not measured."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from everlong.evaluation.streams import StockStream
from everlong.models.anatomy import decoder_of, dissect


@dataclass(frozen=True)
class AttentionShape:
    """One attention layer.

    Attributes
    ----------
    heads, kv_heads : int
        Of the queries, and of the keys.
    key_size, value_size : int
        Numbers in a key and in a value of one head.
    window : int or None
        Keys a query sees at most in a layer with a local window of the model's own; None: full attention.
    has_keys : bool
        Whether it has keys of its own; otherwise it attends to another layer's.
    """

    heads: int
    kv_heads: int
    key_size: int
    value_size: int
    window: int | None
    has_keys: bool

    def limit(self, window: int | None) -> int | None:
        """Return the most keys a query sees under a policy's `window`; None: no limit."""
        return window if self.window is None else self.window

    def held(self, tokens: int) -> int:
        """Return the keys a step sees where full-attention layers hold `tokens`."""
        return tokens if self.window is None else min(tokens, self.window)


@dataclass(frozen=True)
class Work:
    """What a model multiplies and reads.

    Attributes
    ----------
    linear : tuple of str
        Names, inside the decoder, of the linear layers a token goes through.
    weights : int
        Their weights.
    head : int
        Weights of the output embeddings.
    layers : tuple of AttentionShape
        In the order they run.
    element : int
        Bytes of one number of a key or value.
    is_complete : bool
        Whether linear layers are all its weight matrices: experts kept as stacks are not counted.
    """

    linear: tuple[str, ...]
    weights: int
    head: int
    layers: tuple[AttentionShape, ...]
    element: int
    is_complete: bool

    def prefill_flops(self, before: int, tokens: int, window: int | None) -> int:
        """Return the floating-point operations of reading `tokens` tokens after `before` others, no head.

        ``2 * weights * tokens`` for the products, and for attention, over layers and queries, ``2 * heads *
        (key_size + value_size) * keys``: ``2 * 2 * window * d`` for each query head of size d in a full
        window. A query sees itself, what came before it and at most `window` keys (None: no limit); keys that
        a kernel multiplies and masks, softmax, norms and rotations are not counted.
        """
        attention = sum(
            2 * layer.heads * (layer.key_size + layer.value_size) * seen(before, tokens, layer.limit(window))
            for layer in self.layers
        )
        return 2 * self.weights * tokens + attention

    def window_bytes(self, held: int) -> int:
        """Return the bytes of keys and values a step reads where full-attention layers hold `held` tokens."""
        return self.element * sum(
            layer.kv_heads * (layer.key_size + layer.value_size) * layer.held(held) for layer in self.layers
        )

    def state_bytes(self, tokens: int) -> int:
        """Return the bytes of a cache of `tokens` tokens whose full-attention layers throw nothing away."""
        return self.element * sum(
            layer.kv_heads * (layer.key_size + layer.value_size) * layer.held(tokens)
            for layer in self.layers
            if layer.has_keys
        )


def seen(before: int, tokens: int, window: int | None) -> int:
    """Return how many keys `tokens` queries after `before` tokens see together, each at most `window`."""
    growing = tokens if window is None else min(tokens, max(0, window - before))
    full = 0 if window is None else (tokens - growing) * window
    return growing * before + growing * (growing + 1) // 2 + full


def work_of(model: nn.Module) -> Work:
    """Count what `model` has to do.

    Parameters
    ----------
    model : nn.Module
        A detached causal language model.

    Raises
    ------
    UnsupportedModelError
        Its attention cannot be driven from outside.
    """
    decoder: Any = decoder_of(model)
    inner: Any = model
    anatomy = dissect(model)
    stream = StockStream(model)
    names = {module: name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    linear: dict[str, int] = {}

    def note(layer: nn.Module, given: tuple[Any, ...]) -> None:
        assert isinstance(layer, nn.Linear)
        linear[names[layer]] = layer.in_features * layer.out_features

    with ExitStack() as hooks:
        for module in names:
            hooks.callback(module.register_forward_pre_hook(note).remove)
        stream.read(torch.zeros(1, dtype=torch.long, device=decoder.get_input_embeddings().weight.device))
    heads, layers, held = int(decoder.config.num_attention_heads), [], stream.layers
    for layer in anatomy.layers:
        keys, values = held[layer.index if layer.donor is None else layer.donor]
        shape = (keys.shape[1], keys.shape[-1], values.shape[-1])
        layers.append(AttentionShape(heads, *shape, layer.window, layer.donor is None))
    head = inner.get_output_embeddings()
    return Work(
        linear=tuple(linear),
        weights=sum(linear.values()),
        head=head.in_features * head.out_features,
        layers=tuple(layers),
        element=next(iter(held.values()))[0].element_size(),
        is_complete=all(parameter.ndim < 3 for parameter in decoder.parameters()),
    )


def twin_of(model: nn.Module) -> nn.Module:
    """Return a second model that shares the weights: what is attached or packed there is not here."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, shared)
