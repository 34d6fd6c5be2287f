"""Greedy generation that reads the whole sequence again for each new token."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .attention import ReferenceSpec
from .model import reference_logits


def reference_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    spec: ReferenceSpec,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Continue each row by its most likely tokens; no token ends a row early.

    Parameters
    ----------
    model
        See `reference_logits`.
    input_ids
        (b, n) token ids, padded on the left.
    spec
        The method.
    max_new_tokens
        How many tokens to add.
    attention_mask
        (b, n), ones on real tokens.

    Returns
    -------
    Tensor
        (b, n + max_new_tokens) token ids, the prompt included.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    for _ in range(max_new_tokens):
        logits = reference_logits(model, input_ids, spec, mask)
        newest = logits[:, -1].argmax(dim=-1, keepdim=True)
        input_ids = torch.cat((input_ids, newest), dim=1)
        mask = torch.cat((mask, torch.ones_like(newest)), dim=1)
    return input_ids
