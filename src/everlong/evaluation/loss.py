"""How well a plain model predicts a text, with or without another one before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from everlong.errors import InputError
from everlong.evaluation.asking import begun, evaluating
from everlong.models.anatomy import decoder_of
from everlong.models.cache_argument import cache_argument
from everlong.reading.tokens import TextCoder

_CHUNK = 128  # tokens whose logits are held at a time


def surprisal(model: Any, tokenizer: Any, text: str, *, before: str = "") -> Tensor:
    """Return the surprisal of each token of a text that something comes before.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        A causal language model that is not attached, with any adapter of weights, or one whose prefix is
        keys and values (a cartridge). Dropout is off meanwhile.
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's; its start token, if it has one, comes first and predicts the first token.
    text : str
        What is scored.
    before : str
        What is read first and not scored; the text goes on in the middle of it.

    Returns
    -------
    Tensor
        In nats, float32, shape (n,). Without a start token and `before`, the first token is left out.

    Raises
    ------
    InputError
        The text has no token that can be scored.
    """
    coder = TextCoder(tokenizer)
    first = [*coder.bos, *(coder.encode(before) if before else [])]
    ids = [*first, *(coder.encode_after(text) if before else coder.encode(text))]
    scored = max(1, len(first))
    if len(ids) <= scored:
        raise InputError(f"the text {text[:40]!r} has no token that another comes before")
    row = torch.tensor([ids], device=model.device)
    found = []
    with evaluating(model):
        model, cache = begun(model)
        name = cache_argument(decoder_of(model))
        for begin in range(0, len(ids) - 1, _CHUNK):
            stop = min(begin + _CHUNK, len(ids) - 1)
            logits = model(input_ids=row[:, begin:stop], use_cache=True, **{name: cache}).logits[0]
            found.append(F.cross_entropy(logits.float(), row[0, begin + 1 : stop + 1], reduction="none"))
    return torch.cat(found)[scored - 1 :].cpu()
