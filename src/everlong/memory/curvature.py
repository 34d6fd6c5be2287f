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
from collections.abc import Callable, Iterator, Mapping, Sequence
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
_SUMS = 256  # of tokens, by which a change is judged
_KEPT = torch.bfloat16  # what the sums are kept as

CURVATURE = f"1, {_SUMS} sums"
"""How it is measured: another number where anything of that changes but the number of sums."""


@dataclass(frozen=True, eq=False)
class Factors:
    """What is known of one linear layer, in n sums over tokens.

    Attributes
    ----------
    inputs : Tensor (n, in)
        Of what it was given; ``inputs.T @ inputs`` is C, each token counted by how much its output matters.
    slopes : Tensor (n, out)
        Of the gradients of the texts' log-likelihood in its output; ``slopes.T @ slopes`` is G, per token
        written.
    """

    inputs: Tensor
    slopes: Tensor

    def on(self, device: torch.device) -> Factors:
        """Return the same on a device."""
        return Factors(self.inputs.to(device), self.slopes.to(device))

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

    def state(self) -> dict[str, Tensor]:
        """Return named tensors for :meth:`restored`, rounded to two bytes a number."""
        return {
            f"{name}.{part}": tensor.to(_KEPT)
            for name, factors in self.factors.items()
            for part, tensor in (("inputs", factors.inputs), ("slopes", factors.slopes))
        }

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor]) -> Curvature:
        """Rebuild what :meth:`state` returned."""
        names = [name.removesuffix(".inputs") for name in tensors if name.endswith(".inputs")]
        return cls(
            {
                name: Factors(tensors[f"{name}.inputs"].float(), tensors[f"{name}.slopes"].float())
                for name in names
            }
        )

    def of(self, adapted: nn.Module, weight: float = 1.0) -> Callable[[], Tensor]:
        """Return what computes, from an adapter's weights by then, `weight` times what it changes.

        That is a scalar, in nats per token, with a gradient.
        """
        parts = [
            (
                self.factors[name].on(layer.lora_A["memory"].weight.device),
                *(layer.lora_A["memory"], layer.lora_B["memory"], layer.scaling["memory"]),
            )
            for name, layer in adapted_layers(adapted)
            if name in self.factors
        ]

        def changed() -> Tensor:
            each = [
                scaling**2 * factors.of_change(first.weight, second.weight)
                for factors, first, second, scaling in parts
            ]
            return weight * len(each) * torch.stack([found.to(each[0].device) for found in each]).sum()

        return changed


class _Sums:
    """What the layers are given for all tokens, and are worth to the texts: sums of it, with random signs.

    Their second moment is that of all tokens, in the mean over signs. Few tokens are kept as they are.

    Parameters
    ----------
    tokens : int
        Of all forwards, at most.
    draws : torch.Generator
        Of the signs.
    """

    def __init__(self, tokens: int, draws: torch.Generator) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.slopes: dict[str, Tensor] = {}
        self.worth: dict[str, Tensor] = {}
        """The sum of the squares of the slopes."""
        self._tokens = tokens
        self._draws = draws
        self._signs = torch.empty(0, 0)
        self._seen = 0
        self._written = 0

    def begin(self, written: int) -> None:
        """Enter a forward in which so many tokens are predicted; the loss is their mean."""
        self._signs, self._written = torch.empty(0, 0), written

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        """Return a forward hook for a layer."""

        def look(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            inputs = given[0].detach().flatten(0, -2)
            if not len(self._signs):
                self._signs = self._drawn(len(inputs))
            if self._signs.shape[1] == len(inputs):  # not so of an expert, which is given some tokens only
                output.register_hook(partial(self._add, name, inputs))  # type: ignore[no-untyped-call]

        return look

    def _drawn(self, tokens: int) -> Tensor:
        """Return with which sign each of the next tokens counts in each sum."""
        if self._tokens > _SUMS:
            signs = torch.randint(2, (_SUMS, tokens), generator=self._draws)
            return (2.0 * signs - 1.0) / math.sqrt(_SUMS)
        kept = torch.zeros(self._tokens, tokens)
        kept[self._seen : self._seen + tokens] = torch.eye(tokens)
        self._seen += tokens
        return kept

    def _add(self, name: str, inputs: Tensor, slopes: Tensor) -> None:
        signs = self._signs.to(inputs.device)
        told = slopes.flatten(0, -2).float() * self._written
        worth = told.norm(dim=-1, keepdim=True)
        for sums, found in (
            (self.inputs, signs @ (inputs.float() * worth)),
            (self.slopes, signs @ told),
            (self.worth, worth.square().sum()),
        ):
            sums[name] = sums[name] + found if name in sums else found

    def factors(self, written: int) -> dict[str, Factors]:
        """Return the factors of the layers, of texts in which so many tokens were predicted."""
        least = torch.finfo(torch.float32).tiny
        return {
            name: Factors(
                inputs / self.worth[name].sqrt().clamp(min=least), self.slopes[name] / math.sqrt(written)
            )
            for name, inputs in self.inputs.items()
        }


def measured(model: AttachedModel, adapted: nn.Module, texts: Sequence[Lesson], seed: int = 0) -> Curvature:
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
    seed : int
        Of the signs.
    """
    head, lengths = Head(model.attachment.model), list(map(len, texts))
    sums = _Sums(sum(lengths), torch.Generator().manual_seed(seed))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    handles = [layer.register_forward_hook(sums.hook(name)) for name, layer in adapted_layers(adapted)]
    try:
        for batch in in_batches(lengths, _BATCH):
            some = [texts[number].hard() for number in batch]
            sums.begin(sum(len(text.response) for text in some))
            learn_from(model, head, some)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.grad = None
    return Curvature(sums.factors(sum(len(text.response) for text in texts)))


def adapted_layers(adapted: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers that have the memory's adapter, by their names in PEFT's model."""
    for name, module in adapted.named_modules():
        if hasattr(module, "lora_A") and "memory" in module.lora_A:
            yield name, module
