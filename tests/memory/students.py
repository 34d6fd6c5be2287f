"""Tiny models that read and write bytes, attached, with their tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from everlong.attention import LMInfinite, attach
from everlong.memory.lessons import Lesson
from everlong.memory.pairs import Pair
from everlong.models.packing import pack
from everlong.reading.attached import AttachedModel
from tests.tiny import BYTE_VOCAB, build, byte_tokenizer


@contextmanager
def student_of(
    family: str = "llama",
    *,
    seed: int = 0,
    add_bos: bool = True,
    chat: bool = False,
    tokenizer: Any = None,
    packed: bool = False,
    **config: Any,
) -> Iterator[AttachedModel]:
    """A tiny model of a family, attached for the block. It never writes </s> by itself unless told to."""
    fields = {"vocab_size": BYTE_VOCAB, "bos_token_id": 256, "pad_token_id": 258, **config}
    if family == "gemma4_text":
        fields["vocab_size_per_layer_input"] = BYTE_VOCAB
    model = build(family, seed, **fields)
    if tokenizer is None:
        tokenizer = byte_tokenizer(add_bos)
        if not chat:
            tokenizer.chat_template = None
    packing = pack(model, "int8") if packed else None
    with attach(model, LMInfinite(sinks=4, window=32)) as handle:
        yield AttachedModel(handle, tokenizer, "tiny", "int8" if packed else "float")
    if packing is not None:
        packing.undo()


@torch.no_grad()
def plain_logits(model: AttachedModel, ids: list[int]) -> Tensor:
    """Logits after each of these tokens, the model seeing all before it: one forward that keeps nothing."""
    inner: Any = model.attachment.model
    cache = read_nothing(model)
    logits: Tensor = inner(torch.tensor([ids]), **{model.attachment.cache_argument: cache}).logits[0]
    return logits


def read_nothing(model: AttachedModel) -> Any:
    """An empty cache that forgets nothing."""
    from everlong.attention import FullAttention

    return model.attachment.new_cache(FullAttention())


def log_likelihood(model: AttachedModel, before: list[int], tokens: list[int]) -> list[float]:
    """Log-likelihood of each of `tokens` behind `before`, by brute force."""
    logs = plain_logits(model, [*before, *tokens]).double().log_softmax(-1)
    return [float(logs[len(before) + i - 1, token]) for i, token in enumerate(tokens)]


def lesson(query: str, response: str, generator: str = "cloze", **fields: Any) -> Lesson:
    """A lesson in bytes whose only thing to expect is the response."""
    pair = Pair(query, response, generator, **fields)
    made = Lesson(pair, [256, *query.encode()], list(response.encode()), Tensor(), Tensor())
    return made.hard()


def parameters_of(model: AttachedModel) -> dict[str, Tensor]:
    """Copies of all parameters of the model as it is."""
    return {name: p.detach().clone() for name, p in model.attachment.model.named_parameters()}
