"""How much a change of weights changes what a model says of everything else: the curvature of its likelihood.

Elastic weight consolidation (Kirkpatrick et al., 2017) holds what is trained near what it was, in each
direction as firmly as that matters to what was known. Here that is what the base model writes by itself; and
how much a direction matters is known layer by layer, from what the layer is given and what its output is
worth (K-FAC: Martens and Grosse, 2015; against forgetting: Ritter, Botev and Barber, 2018). So a change of
weights is judged by tokens that were run once, before anything is learned; and one adapter is judged as a
whole, however many segments it learned.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from everlong.memory.consolidation import learn_from
from everlong.memory.forest import in_batches
from everlong.memory.lessons import Lesson
from everlong.models.head import Head
from everlong.reading.attached import AttachedModel

_BATCH = 512  # tokens a forward
_KEPT = 512  # tokens, about, by which a change is judged


@dataclass(frozen=True, eq=False)
class Factors:
    """What is known of one linear layer, from n tokens.

    Attributes
    ----------
    inputs : Tensor (n, in)
        What it was given; their second moment is C, each token counted by how much its output matters.
    slopes : Tensor (n, out)
        Gradients of the texts' log-likelihood in its output; their second moment is G, per token written.
    """

    inputs: Tensor
    slopes: Tensor

    def of_change(self, first: Tensor, second: Tensor) -> Tensor:
        """Return ½ tr(G ΔW C ΔWᵀ) of ΔW = second @ first, shapes (out, r) and (r, in), in nats per token."""
        read, told = first.float() @ self.inputs.T, second.float().T @ self.slopes.T
        return 0.5 * ((read @ read.T) * (told @ told.T)).sum()


class Curvature:
    """What a LoRA adapter on the linear layers of a model changes in texts of the model's own.

    Layers are judged apart, and then as if all changed the texts in the same sense: their sum is taken as
    many times as there are layers, which is the most that changes add up to.

    Parameters
    ----------
    factors : dict of str to Factors
        By the layers' names; empty: nothing is known, and nothing judged.
    """

    def __init__(self, factors: dict[str, Factors]) -> None:
        self.factors = factors

    def of(self, adapted: nn.Module, weight: float = 1.0) -> Callable[[], Tensor]:
        """Return what computes, from an adapter's weights by then, `weight` times what it changes.

        That is a scalar, in nats per token, with a gradient.
        """
        parts = [
            (self.factors[name], layer.lora_A["memory"], layer.lora_B["memory"], layer.scaling["memory"])
            for name, layer in _adapted_layers(adapted)
            if name in self.factors
        ]

        def changed() -> Tensor:
            each = [
                scaling**2 * factors.of_change(first.weight, second.weight)
                for factors, first, second, scaling in parts
            ]
            return weight * len(each) * torch.stack([found.to(each[0].device) for found in each]).sum()

        return changed


class _Kept:
    """Some tokens of a forward, and what the layers are given for them and are worth to the texts."""

    def __init__(self, share: float, draws: random.Random) -> None:
        self.factors: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        self.tokens = 0
        """Of all forwards."""
        self._share = share
        self._draws = draws
        self._rows = torch.empty(0, dtype=torch.long)
        self._run = 0  # tokens of this forward, once the first layer was given them
        self._written = 0

    def begin(self, written: int) -> None:
        """Enter a forward in which so many tokens are predicted; the loss is their mean."""
        self._run, self._written = 0, written

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        """Return a forward hook for a layer."""

        def look(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            inputs = given[0].detach().flatten(0, -2)
            if not self._run:
                self._choose(len(inputs))
            if self._run == len(inputs):  # not so of an expert, which is given some tokens only
                output.register_hook(partial(self._keep, name, inputs))  # type: ignore[no-untyped-call]

        return look

    def _choose(self, tokens: int) -> None:
        count = max(1, round(self._share * tokens))
        self._rows = torch.tensor(sorted(self._draws.sample(range(tokens), min(count, tokens))))
        self._run = tokens
        self.tokens += tokens

    def _keep(self, name: str, inputs: Tensor, slopes: Tensor) -> None:
        rows = self._rows.to(inputs.device)
        given, told = self.factors.setdefault(name, ([], []))
        given.append(inputs[rows].float())
        told.append(slopes.flatten(0, -2)[rows].float() * self._written)


def measured(
    model: AttachedModel, adapted: nn.Module, texts: Sequence[Lesson], draws: random.Random
) -> Curvature:
    """Measure a model on texts that were drawn from it.

    Being drawn from it, their own tokens are fair samples of what it expects: the second moment of their
    gradients is the Fisher information, which is the curvature of the Kullback-Leibler divergence.

    Parameters
    ----------
    model : AttachedModel
        The model.
    adapted : nn.Module
        The same with an adapter of PEFT's that changes nothing yet, by which gradients come in.
    texts : sequence of Lesson
        The texts; what was drawn is their response.
    draws : random.Random
        Of the tokens that are kept.
    """
    head, lengths = Head(model.attachment.model), list(map(len, texts))
    kept = _Kept(_KEPT / max(1, sum(lengths)), draws)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    handles = [layer.register_forward_hook(kept.hook(name)) for name, layer in _adapted_layers(adapted)]
    try:
        for batch in in_batches(lengths, _BATCH):
            some = [texts[number].hard() for number in batch]
            kept.begin(sum(len(text.response) for text in some))
            learn_from(model, head, some)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.grad = None
    written = sum(len(text.response) for text in texts)
    return Curvature({name: _factors(*of, kept.tokens / written) for name, of in kept.factors.items()})


def _factors(inputs: list[Tensor], slopes: list[Tensor], tokens_a_word: float) -> Factors:
    """Return the factors of a layer, each scaled so that its product with itself is the moment."""
    given, told = torch.cat(inputs), torch.cat(slopes)
    worth = told.norm(dim=-1, keepdim=True)
    total = worth.norm().clamp(min=torch.finfo(worth.dtype).tiny)
    return Factors(given * (worth / total), told * math.sqrt(tokens_a_word / len(told)))


def _adapted_layers(adapted: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers that have an adapter, by their names in PEFT's model."""
    for name, module in adapted.named_modules():
        if hasattr(module, "lora_A") and "memory" in module.lora_A:
            yield name, module
