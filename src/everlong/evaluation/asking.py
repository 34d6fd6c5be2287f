"""Greedy answers to many prompts, with or without a text before them."""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from everlong.errors import InputError
from everlong.models.adapters import while_peft_wraps
from everlong.models.anatomy import decoder_of
from everlong.models.cache_argument import cache_argument
from everlong.reading.prompts import find_form
from everlong.reading.tokens import TextCoder, TokenStream

_CHUNK = 1024  # tokens of the shared part in one forward


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    context: str | Sequence[str] = "",
    max_new_tokens: int = 16,
    batch: int = 32,
    stop: str = "\n",
    in_turns: bool = False,
) -> list[str]:
    """Let a model go on from each prompt, taking the likeliest token each time.

    What all prompts begin with, and the context above all, is read once. The rows of a batch are padded on
    the left of where they differ; where that would move a local window, they are of equal length instead.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        A causal language model that is not attached, with any adapter of weights, or one whose prefix is
        keys and values (a cartridge). Dropout is off meanwhile.
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's; what it puts before a text by itself, a start token or nothing, comes first here too.
    prompts : sequence of str
        Not empty, each, after the context.
    context : str or sequence of str
        A text to read before all prompts, or one for each; a blank line is put between. Never truncated.
    max_new_tokens : int
        Tokens written at most.
    batch : int
        Prompts at a time.
    stop : str
        What ends an answer, beside the model's own end of text; it is not part of the answer.
    in_turns : bool
        Whether prompts are questions, which are asked as sessions ask them, after the context: in the user's
        turn where there is a chat template, and as ``Question: …`` in running text where there is none.

    Returns
    -------
    list of str
        In the order of the prompts, without blanks at either end.

    Raises
    ------
    InputError
        A prompt is empty, or there is another number of contexts.
    """
    if not isinstance(context, str) and len(context) != len(prompts):
        raise InputError(f"{len(context)} contexts for {len(prompts)} prompts; pass one, or one for each")
    if any(not prompt for prompt in prompts):
        raise InputError(f"prompt {list(prompts).index('')} is empty: there is nothing to go on from")
    if not prompts:
        return []
    lay_out = _in_turns if in_turns else _encoded
    rows = lay_out(tokenizer, prompts, context)
    shared = _shared(rows)
    rests = [row[shared:] for row in rows]
    written = [""] * len(rows)
    with evaluating(model):
        model, cache = begun(model)
        longest = cache.get_seq_length() + max(map(len, rows)) + max_new_tokens
        _read(model, cache, rows[0][:shared])
        for group in _batches(rests, batch, equal=_slides(model, longest)):
            found = _write(model, tokenizer, cache, [rests[i] for i in group], max_new_tokens, stop)
            for i, text in zip(group, found, strict=True):
                written[i] = text
    return written


@contextmanager
def evaluating(model: Any) -> Generator[None, None, None]:
    """Turn dropout and gradients off for the block, and leave the model in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def _encoded(tokenizer: Any, prompts: Sequence[str], context: str | Sequence[str]) -> list[list[int]]:
    coder = TextCoder(tokenizer)
    contexts = [context] * len(prompts) if isinstance(context, str) else list(context)
    before = {text: coder.encode(text.rstrip() + "\n\n") if text.strip() else [] for text in set(contexts)}
    return [
        [*coder.bos, *before[text], *(coder.encode_after(prompt) if before[text] else coder.encode(prompt))]
        for text, prompt in zip(contexts, prompts, strict=True)
    ]


def _in_turns(tokenizer: Any, prompts: Sequence[str], context: str | Sequence[str]) -> list[list[int]]:
    coder, form = TextCoder(tokenizer), find_form(tokenizer, with_system=False)
    contexts = [context] * len(prompts) if isinstance(context, str) else list(context)
    rows = []
    for text, prompt in zip(contexts, prompts, strict=True):
        stream = TokenStream(coder)
        ids = stream.markup(form.before_system) if form.is_chat else list(coder.bos)
        ids += stream.feed(text.rstrip() + form.question(prompt, after_text=bool(text.strip())))
        rows.append([*ids, *stream.markup(form.to_assistant), *stream.finish()])
    return rows


def _shared(rows: Sequence[Sequence[int]]) -> int:
    """Return how many ids all rows begin with; each keeps one of its own."""
    most = min(map(len, rows)) - 1
    first = rows[0]
    return next((i for i in range(most) if any(row[i] != first[i] for row in rows)), most)


def _slides(model: Any, length: int) -> bool:
    """Whether a layer sees less than `length` tokens back, so that padding would count as some of them."""
    config = model.config.get_text_config()
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return any(window is not None and window < length for window in windows)


def _batches(rests: Sequence[Sequence[int]], batch: int, *, equal: bool) -> list[list[int]]:
    """Return the numbers of the rows that go together, those of like length."""
    groups: list[list[int]] = []
    for i in sorted(range(len(rests)), key=lambda i: len(rests[i])):
        last = groups[-1] if groups else []
        if not last or len(last) == batch or (equal and len(rests[last[0]]) != len(rests[i])):
            groups.append([])
        groups[-1].append(i)
    return groups


def begun(model: Any) -> tuple[Any, Any]:
    """Return the model that is run, and a cache that holds nothing, or the prefix of PEFT's (a cartridge)."""
    if not any(getattr(config, "is_prompt_learning", False) for config in _adapters(model)):
        return model, DynamicCache(config=model.config)
    with while_peft_wraps():
        return model.get_base_model(), model.get_prompt(batch_size=1)


def _adapters(model: Any) -> list[Any]:
    known = getattr(model, "peft_config", None)
    return list(known.values()) if isinstance(known, dict) else []


def _read(model: Any, cache: Any, ids: Sequence[int]) -> None:
    decoder: Any = decoder_of(model)
    for begin in range(0, len(ids), _CHUNK):
        piece = torch.tensor([ids[begin : begin + _CHUNK]], device=model.device)
        decoder(input_ids=piece, use_cache=True, **{cache_argument(decoder): cache})


def _write(
    model: Any, tokenizer: Any, read: Any, rests: list[Sequence[int]], most: int, stop: str
) -> list[str]:
    """Go on from what was read with the rest of each prompt."""
    cache, shared = copy.deepcopy(read), read.get_seq_length()
    if shared:
        cache.batch_repeat_interleave(len(rests))
    device, width = model.device, max(map(len, rests))
    pads = torch.tensor([width - len(rest) for rest in rests], device=device)[:, None]
    ids = torch.tensor([[rest[0]] * (width - len(rest)) + list(rest) for rest in rests], device=device)
    own = (torch.arange(width, device=device) >= pads).long()
    mask = torch.cat((torch.ones(len(rests), shared, dtype=torch.long, device=device), own), dim=1)
    positions = (shared + torch.arange(width, device=device) - pads).clamp(min=0)
    decoder, ends = decoder_of(model), _ends(model, tokenizer)
    written: list[list[int]] = [[] for _ in rests]
    texts = [""] * len(rests)
    is_done = [False] * len(rests)
    for _ in range(most):
        logits: Tensor = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{cache_argument(decoder): cache},
        ).logits[:, -1]
        ids = logits.argmax(-1, keepdim=True)
        for row, token in enumerate(ids[:, 0].tolist()):
            if is_done[row]:
                continue
            if token in ends:
                is_done[row] = True
                continue
            written[row].append(token)
            texts[row] = tokenizer.decode(written[row], skip_special_tokens=True)
            # A model may begin with the stop itself; what ends an answer stands after a word of it.
            begin = len(texts[row]) - len(texts[row].lstrip())
            if (at := texts[row].find(stop, begin)) >= 0:
                texts[row], is_done[row] = texts[row][:at], True
        if all(is_done):
            break
        mask = torch.cat((mask, mask.new_ones(len(rests), 1)), dim=1)
        positions = positions[:, -1:] + 1
    return [text.strip() for text in texts]


def _ends(model: Any, tokenizer: Any) -> set[int]:
    declared = getattr(model.generation_config, "eos_token_id", None)
    found = declared if isinstance(declared, list) else [declared]
    return {int(token) for token in [*found, tokenizer.eos_token_id] if token is not None}
