"""A fingerprint of a model's weights: which weights a saved state belongs to."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

SAMPLES = 4096
"""Values that are read of each tensor, evenly spread over it, the first and the last included."""


@torch.no_grad()
def weights_hash(model: nn.Module) -> str:
    """Return a SHA-256 that tells one model's weights from another's.

    It covers every tensor's name, type and shape, and up to 4096 of its values, evenly spread. Training,
    merging an adapter or quantising changes practically all values of a tensor, and so the fingerprint; a
    change of a single value most likely not. Reading all of a large model would take minutes; this takes well
    under a second for hundreds of millions of weights.

    Parameters
    ----------
    model : nn.Module
        The device does not matter; the type of the weights does.

    Returns
    -------
    str
        64 hexadecimal digits. Buffers that are not saved with the model, such as rotary tables, do not count.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor!r};".encode())
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        if tensor.numel() and not tensor.is_meta:
            digest.update(_sample(tensor))
    return digest.hexdigest()


def _sample(tensor: torch.Tensor) -> bytes:
    """Return the bytes of up to `SAMPLES` values of `tensor`."""
    flat = tensor.detach().reshape(-1)
    count = min(flat.numel(), SAMPLES)
    steps = torch.arange(count, device=flat.device)
    chosen = flat[steps * (flat.numel() - 1) // max(count - 1, 1)]
    return chosen.cpu().contiguous().view(torch.uint8).numpy().tobytes()
