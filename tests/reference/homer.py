"""HOMER by its definition: a stock model's layers, one by one on each chunk, and plain loops between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tests.tiny import CACHE_ARGUMENT

Ids = list[int]


@dataclass
class Node:
    """A chunk after some layers: hidden states (n, d), raw keys and values (heads, n, d), attention (n,)."""

    hidden: Tensor
    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    weights: list[float]


class Homer:
    """HOMER with a stock model that has eager attention, in float64.

    Parameters
    ----------
    prefix, suffix
        What every chunk begins and ends with.
    chunks
        2^h pieces of the text.
    room
        Tokens of the text in a chunk at most.
    borders
        Layers passed before each of the h merges.
    calibrated
        Numbers of the chunks on which the bias is measured.
    most_bins
        Shares of a chunk in which it is; a chunk of fewer tokens has one for each.
    neighbours
        Tokens on either side of which the one attended to most counts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prefix: Ids,
        chunks: Sequence[Ids],
        suffix: Ids,
        room: int,
        borders: Sequence[int],
        calibrated: Sequence[int] = (),
        most_bins: int = 1,
        neighbours: int = 0,
    ) -> None:
        self.model: Any = model
        self.layers = list(self.model.model.layers)
        self.prefix, self.chunks, self.suffix, self.room = prefix, chunks, suffix, room
        self.neighbours = neighbours
        self.borders = [0, *borders, len(self.layers)]
        bins = min(most_bins, *map(len, chunks))
        self.biases = [self.bias(level, calibrated, bins) for level in range(len(borders))]

    @torch.no_grad()
    def logits(self, answer: Ids) -> Tensor:
        """Logits (1 + len(answer), vocabulary) behind the last merged chunk, and behind each token of one."""
        root = self.root
        first = self.model.lm_head(self.model.model.norm(root.hidden[None, -1:]))[0]
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        first = first if cap is None else torch.tanh(first / cap) * cap
        if not answer:
            return first
        n = len(root.hidden)
        cache = DynamicCache()
        for number in range(len(self.layers)):
            keys = self.turned(root.keys[number], number, 1)
            cache.update(keys[None], root.values[number][None], number)
        after = self.model(
            torch.tensor([answer]),
            position_ids=torch.arange(n, n + len(answer))[None],
            **{CACHE_ARGUMENT: cache},
        ).logits[0]
        return torch.cat((first, after))

    @cached_property
    def root(self) -> Node:
        """The last merged chunk, behind all layers."""
        return self.node(len(self.borders) - 2, 0)

    def node(self, level: int, number: int) -> Node:
        """The chunk with that number on a level (0: the text's own), up to the next border."""
        if level == 0:
            start = Node(self.embedded(number), {}, {}, [])
        else:
            left, right = (self.node(level - 1, 2 * number + side) for side in (0, 1))
            start = self.merged(left, right, level - 1)
        return self.run(start, self.borders[level], self.borders[level + 1])

    @torch.no_grad()
    def embedded(self, number: int) -> Tensor:
        ids = [*self.prefix, *self.chunks[number], *self.suffix]
        hidden: Tensor = self.model.model.embed_tokens(torch.tensor([ids]))[0]
        return hidden

    def merged(self, left: Node, right: Node, level: int) -> Node:
        """What two neighbours are together."""
        around = len(self.prefix) + len(self.suffix)
        has = [len(one.hidden) - around for one in (left, right)]
        half = [self.room - self.room // 2, self.room // 2]
        while has[0] + has[1] > self.room:  # a token less, of one that has more than its half
            over = [side for side in (0, 1) if has[side] > half[side]]
            has[over[-1]] -= 1
        chosen = [self.chosen(one, count, level) for one, count in zip((left, right), has, strict=True)]
        first, last = len(self.prefix), len(self.suffix)

        def joined(mine: Tensor, its: Tensor) -> Tensor:
            pieces = [(mine[..., at, :] + its[..., at, :]) / 2 for at in range(first)]
            pieces += [mine[..., at, :] for at in chosen[0]] + [its[..., at, :] for at in chosen[1]]
            pieces += [(mine[..., at, :] + its[..., at, :]) / 2 for at in range(-last, 0)]
            return torch.stack(pieces, -2)

        return Node(
            joined(left.hidden, right.hidden),
            {number: joined(x, right.keys[number]) for number, x in left.keys.items()},
            {number: joined(x, right.values[number]) for number, x in left.values.items()},
            [],
        )

    def chosen(self, node: Node, count: int, level: int) -> list[int]:
        """Where the tokens of the text stand that stay."""
        first, stop = len(self.prefix), len(node.hidden) - len(self.suffix)
        bias = self.biases[level]
        significance = {}
        for at in range(first, stop):
            share = (at - first) * len(bias) // (stop - first) if bias else 0
            significance[at] = self.attended(node, at) - (bias[share] if bias else 0.0)
        return sorted(sorted(significance, key=lambda at: (-significance[at], at))[:count])

    def attended(self, node: Node, at: int) -> float:
        """The most that a token of the text, or one near it, is attended to."""
        first, stop = len(self.prefix), len(node.hidden) - len(self.suffix)
        near = range(max(first, at - self.neighbours), min(stop, at + self.neighbours + 1))
        return max(node.weights[one] for one in near)

    def bias(self, level: int, calibrated: Sequence[int], bins: int) -> list[float]:
        """What the last token's attention is on average in each share of a chunk that goes up alone."""
        received: list[list[float]] = [[] for _ in range(bins)]
        for number in calibrated:
            alone = self.run(Node(self.embedded(number), {}, {}, []), 0, self.borders[level + 1])
            n = len(self.chunks[number])
            for at in range(n):
                received[at * bins // n].append(self.attended(alone, len(self.prefix) + at))
        return [sum(some) / len(some) for some in received] if calibrated else []

    @torch.no_grad()
    def run(self, node: Node, begin: int, stop: int) -> Node:
        """Let a chunk go through layers `begin` to `stop`, seeing itself, from position 0 on."""
        hidden, keys, values = node.hidden[None], dict(node.keys), dict(node.values)
        n = hidden.shape[1]
        positions = torch.arange(n)[None]
        weights: list[float] = []
        for number in range(begin, stop):
            layer, window = self.layers[number], self.window(number)
            mask = torch.full((1, 1, n, n), -1e30, dtype=hidden.dtype)
            for i in range(n):
                mask[0, 0, i, 0 if window is None else max(0, i + 1 - window) : i + 1] = 0
            seen = []
            hook = layer.self_attn.register_forward_hook(
                lambda _m, _a, output, seen=seen: seen.append(output)
            )
            cache = DynamicCache()
            for before in range(number):  # a cache is filled from the first layer on
                cache.update(hidden.new_zeros(1, 1, 0, 1), hidden.new_zeros(1, 1, 0, 1), before)
            kind = self.kind(number)
            rotary = self.model.model.rotary_emb
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=positions,
                position_embeddings=rotary(hidden, positions, *([kind] if self.has_kinds else [])),
                **{CACHE_ARGUMENT: cache},
            )
            hook.remove()
            keys[number] = self.turned(cache.layers[number].keys[0], number, -1)
            values[number] = cache.layers[number].values[0]
            last = seen[0][1][0, :, -1]  # (heads, n)
            weights = [sum(float(head[at]) for head in last) / len(last) for at in range(n)]
        return Node(hidden[0], keys, values, weights)

    # --- what the layers are ------------------------------------------------------------------------

    @property
    def has_kinds(self) -> bool:
        return hasattr(self.model.model.rotary_emb, "full_attention_inv_freq")

    def kind(self, number: int) -> str:
        kinds = getattr(self.model.config, "layer_types", None)
        return kinds[number] if kinds else "full_attention"

    def window(self, number: int) -> int | None:
        return self.model.config.sliding_window if self.kind(number) == "sliding_attention" else None

    def turned(self, keys: Tensor, number: int, way: int) -> Tensor:
        """Keys (heads, n, d), each turned by its position (way 1), or back (way -1)."""
        rotary = self.model.model.rotary_emb
        name = f"{self.kind(number)}_inv_freq" if self.has_kinds else "inv_freq"
        frequencies = getattr(rotary, name).double()
        half = len(frequencies)
        turned = keys.clone()
        for at in range(keys.shape[1]):
            cos, sin = (way * at * frequencies).cos(), (way * at * frequencies).sin()
            a, b = keys[:, at, :half], keys[:, at, half : 2 * half]
            turned[:, at, :half], turned[:, at, half : 2 * half] = a * cos - b * sin, b * cos + a * sin
        return turned
