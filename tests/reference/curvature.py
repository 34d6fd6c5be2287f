"""The curvature of a model's own texts by its factors, written out: one text at a time, whole matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor


def reference_curvature(
    forward: Any, layers: Mapping[str, torch.nn.Module], texts: Sequence[tuple[list[int], list[int]]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return C, shape (in, in), and G, shape (out, out), of each layer, in float64.

    Parameters
    ----------
    forward : callable
        Returns the logits after each of some tokens, shape (n, vocabulary), with a gradient.
    layers : mapping of str to Module
        The linear layers.
    texts : sequence of (list of int, list of int)
        What each begins with, and what was drawn after it.
    """
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    slopes: dict[str, list[Tensor]] = {name: [] for name in layers}
    for beginning, drawn in texts:
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        hooks = [layer.register_forward_hook(partial(_look, seen, name)) for name, layer in layers.items()]
        log_probs = torch.log_softmax(forward([*beginning, *drawn]).double(), -1)
        for hook in hooks:
            hook.remove()
        at = torch.arange(len(beginning) - 1, len(beginning) + len(drawn) - 1)
        likelihood = log_probs[at, torch.tensor(drawn)].sum()
        gradients = torch.autograd.grad(likelihood, [output for _, output in seen.values()])
        for (name, (given, _)), gradient in zip(seen.items(), gradients, strict=True):
            inputs[name] += given.detach().flatten(0, -2).double()
            slopes[name] += gradient.flatten(0, -2).double()
    written = sum(len(drawn) for _, drawn in texts)
    found = {}
    for name in layers:
        worth = [slope.square().sum() for slope in slopes[name]]
        moment = sum(w * torch.outer(x, x) for w, x in zip(worth, inputs[name], strict=True)) / sum(worth)
        found[name] = (moment, sum(torch.outer(slope, slope) for slope in slopes[name]) / written)
    return found


def _look(
    seen: dict[str, tuple[Tensor, Tensor]], name: str, module: Any, given: tuple[Tensor], output: Tensor
) -> None:
    seen[name] = given[0], output
