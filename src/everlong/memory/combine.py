"""Several LoRA adapters as one, whose effect is the weighted sum of theirs.

A sum of products B A is itself one: of the matrices B beside each other and the matrices A below each other.
That is exact, and takes the sum of the ranks. Where this is more than the largest rank that is kept, the best
approximation of that rank is taken, by singular value decomposition (Eckart and Young, 1936).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from everlong.errors import ConfigurationError, InputError
from everlong.memory.adapter import Adapter
from everlong.memory.compatible import RANKS, lora_key

Factors = tuple[Tensor, Tensor]
_TOLD = 5e-4  # of the weights, left out: less is 0.0 %


@dataclass(frozen=True)
class Combination:
    """One adapter made of several.

    Attributes
    ----------
    adapter : Adapter
        Its scaling is 1; weights and scalings are folded into its matrices.
    method : {"cat", "svd"}
        Whether all of it is exact, or a layer had to be approximated.
    error : float
        Frobenius norm of what was left out, over that of the whole, all layers together; 0.0 if exact.
    """

    adapter: Adapter
    method: str
    error: float

    def told(self, whose: str) -> Adapter:
        """Return the adapter; warn, naming what it was made of, where it is not all of that."""
        if self.error > _TOLD:
            warnings.warn(
                f"{whose} together need a rank above {RANKS[-1]}: of their weights {self.error:.1%} are left "
                "out. Use fewer at a time, or learn with a smaller rank",
                stacklevel=3,
            )
        return self.adapter

    @property
    def rank(self) -> int:
        """Rank of the adapter."""
        return next(len(t) for name, t in self.adapter.tensors.items() if name.endswith("lora_A.weight"))


def combine(adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> Combination:
    """Combine LoRA adapters of one base model.

    Parameters
    ----------
    adapters : sequence of Adapter
        Plain LoRA (:func:`everlong.memory.compatible.lora_problems`), of any ranks, on any modules.
    weights : sequence of float, optional
        What each one's effect is multiplied with; 1 by default.

    Returns
    -------
    Combination
        Padded with zeros to the next rank that is kept (:data:`everlong.memory.compatible.RANKS`).

    Raises
    ------
    ConfigurationError
        If there are no adapters, or weights that do not fit.
    InputError
        If one is not plain LoRA, or two have different shapes for the same layer.
    """
    weights = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if not adapters or len(weights) != len(adapters):
        raise ConfigurationError(f"{len(adapters)} adapters cannot be combined with {len(weights)} weights")
    if not all(map(math.isfinite, weights)):
        raise ConfigurationError(f"weights must be finite numbers, not {weights}")
    parts: dict[str, list[Factors]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        adapter.require_plain("lora")
        for module, (lower, upper) in _factors(adapter).items():
            parts.setdefault(module, []).append((lower * (weight * _scaling(adapter.config)), upper))
    layers = {module: _joined(module, factors) for module, factors in parts.items()}
    wanted = max(len(lower) for lower, _ in layers.values())
    rank = next((rank for rank in RANKS if rank >= wanted), RANKS[-1])
    error = 0.0
    if wanted > rank:
        layers, error = _approximated(layers, rank)
    first: Any = adapters[0]
    config = dataclasses.replace(
        first.config, r=rank, lora_alpha=rank, use_rslora=False, **_targets(adapters, list(layers))
    )
    tensors = {}
    for module, (lower, upper) in layers.items():
        spare = rank - len(lower)
        tensors[f"base_model.model.{module}.lora_A.weight"] = pad(lower, (0, 0, 0, spare))
        tensors[f"base_model.model.{module}.lora_B.weight"] = pad(upper, (0, spare))
    return Combination(Adapter(config, tensors), "svd" if wanted > rank else "cat", error)


def _factors(adapter: Adapter) -> dict[str, Factors]:
    """Return A and B of each module, in at least float32."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in adapter.tensors.items():
        module, part = lora_key(key) or ("", "")
        found.setdefault(module, {})[part] = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return {module: (pair["lora_A"], pair["lora_B"]) for module, pair in found.items()}


def _scaling(config: Any) -> float:
    """Return what PEFT multiplies the product with."""
    return float(config.lora_alpha) / (math.sqrt(config.r) if config.use_rslora else config.r)


def _joined(module: str, factors: list[Factors]) -> Factors:
    """Lay matrices A (rank, in) below and matrices B (out, rank) beside each other."""
    if len({(lower.shape[1], upper.shape[0]) for lower, upper in factors}) > 1:
        raise InputError(
            f"these adapters do not belong to one base model: {module} has different shapes in them"
        )
    return torch.cat([lower for lower, _ in factors]), torch.cat([upper for _, upper in factors], 1)


def _approximated(layers: dict[str, Factors], rank: int) -> tuple[dict[str, Factors], float]:
    """Cut each layer to `rank` and return the layers with the error relative to them all."""
    cut: dict[str, Factors] = {}
    whole = lost = 0.0
    for module, (lower, upper) in layers.items():
        # The product's singular values are those of a matrix as small as its rank.
        left, left_rest = torch.linalg.qr(upper.double())
        right, right_rest = torch.linalg.qr(lower.double().T)
        u, sizes, v = torch.linalg.svd(left_rest @ right_rest.T, full_matrices=False)
        whole += float(sizes.square().sum())
        lost += float(sizes[rank:].square().sum())
        roots = sizes[:rank].sqrt()
        cut[module] = (
            (roots[:, None] * (v[:rank] @ right.T)).to(lower.dtype),
            (left @ u[:, :rank] * roots).to(upper.dtype),
        )
    return cut, math.sqrt(lost / whole) if whole else 0.0


def _targets(adapters: Sequence[Adapter], modules: list[str]) -> dict[str, Any]:
    """Return the options of ``LoraConfig`` that choose exactly these modules."""
    configs: list[Any] = [adapter.config for adapter in adapters]
    narrowed = ("exclude_modules", "layers_to_transform", "layers_pattern")
    everywhere = not any(getattr(config, option) for config in configs for option in narrowed)
    if everywhere and all(isinstance(config.target_modules, (list, set)) for config in configs):
        chosen: Any = set().union(*(config.target_modules for config in configs))
    else:
        chosen = set(modules)
    return {"target_modules": chosen, **dict.fromkeys(narrowed), "init_lora_weights": True}
