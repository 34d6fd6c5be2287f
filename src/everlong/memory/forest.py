"""Many short texts in one forward, with one common past: nothing is padded, and the past is read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from everlong.attention import FullAttention, StreamCache
from everlong.attention.branches import Branches
from everlong.reading.attached import AttachedModel

_CHUNK = 512  # tokens of the past read at a time


def read_past(model: AttachedModel, ids: Sequence[int]) -> StreamCache:
    """Return what the model keeps of `ids`, all of their keys; may be none."""
    cache = model.attachment.new_cache(FullAttention())
    decoder: Any = model.attachment.decoder
    with torch.inference_mode():
        for start in range(0, len(ids), _CHUNK):
            given = torch.tensor([ids[start : start + _CHUNK]], device=model.device)
            decoder(input_ids=given, use_cache=True, **{model.attachment.cache_argument: cache})
    return cache


def run_forest(model: AttachedModel, past: StreamCache, texts: Sequence[Sequence[int]]) -> Tensor:
    """Run each of `texts` as if it alone followed `past`, which stays as it is.

    Where several begin alike, their beginning is run once.

    Gradients flow to whatever of the model wants them, if they are enabled; not into the past.

    Parameters
    ----------
    model : AttachedModel
        The model.
    past : StreamCache
        What comes before each text; of :func:`read_past`.
    texts : sequence of sequence of int
        Token ids, at least one each.

    Returns
    -------
    Tensor (n, d)
        The decoder's output for all tokens, one text after another.
    """
    parents: list[int] = []
    tokens: list[int] = []
    nodes: dict[tuple[int, int], int] = {}  # a token behind another
    places: list[int] = []
    for text in texts:
        node = -1
        for token in text:
            behind = node
            node = nodes.setdefault((behind, token), len(tokens))
            if node == len(tokens):
                tokens.append(token)
                parents.append(behind)
            places.append(node)
    ids = torch.tensor([tokens], device=model.device)
    decoder: Any = model.attachment.decoder
    try:
        with past.provisional(Branches(parents)):
            call = {model.attachment.cache_argument: past, "use_cache": True, "input_ids": ids}
            hidden: Tensor = decoder(**call).last_hidden_state[0]
    finally:
        past.rollback()
    return hidden if len(places) == len(tokens) else hidden[torch.tensor(places, device=hidden.device)]


def in_batches(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Put texts of these lengths into batches of at most `most` tokens (or a single text), in order."""
    batches: list[list[int]] = []
    room = 0
    for number, length in enumerate(lengths):
        if length > room or not batches:
            batches.append([])
            room = most
        batches[-1].append(number)
        room -= length
    return batches
