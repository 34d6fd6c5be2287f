"""Methods that drive a model from outside, by definition: stock forwards, explicit masks, plain loops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

Ids = list[int]


@torch.no_grad()
def question_attention(model: PreTrainedModel, ids: Ids, begin: int, stop: int, layer: int) -> list[float]:
    """What each token before `begin` receives from tokens `begin` to `stop`, summed over query heads.

    Parameters
    ----------
    model
        A stock model with eager attention, which can tell its weights.
    ids
        The whole input.
    layer
        Whose attention.
    """
    (weights,) = model(torch.tensor([ids]), output_attentions=True).attentions[layer]
    return [
        sum(float(weights[head, i, j]) for head in range(len(weights)) for i in range(begin, stop))
        for j in range(begin)
    ]


def picked_sentences(
    attention: Sequence[float], lengths: Sequence[int], top: int, smoothing: int, most: int
) -> list[int]:
    """The sentences of the `top` tokens that receive most, smoothed; at most `most` tokens of them."""
    smoothed = {}
    for token in range(len(attention)):
        first = token - smoothing // 2
        near = [j for j in range(first, first + smoothing) if 0 <= j < len(attention)]
        smoothed[token] = sum(attention[j] for j in near)
    best = sorted(smoothed, key=lambda token: (-smoothed[token], token))[:top]
    ends = [sum(lengths[: number + 1]) for number in range(len(lengths))]
    chosen: list[int] = []
    for token in best:
        number = next(number for number, end in enumerate(ends) if token < end)
        fits = sum(lengths[one] for one in chosen) + lengths[number] <= most
        if number not in chosen and fits:
            chosen.append(number)
    return sorted(chosen)


def carried_to_the_end(
    model: PreTrainedModel,
    sentences: Sequence[Ids],
    around: tuple[Ids, Ids, Ids],
    layer: int,
    *,
    chunk: int,
    top: int,
    smoothing: int,
    most: int,
) -> list[Ids]:
    """The sentences from which InfiniRetri answers: those carried, then those of the last chunk.

    Parameters
    ----------
    around
        What the conversation begins with, the question, and what stands between it and the answer.
    """
    opening, question, after = around
    chunks: list[list[Ids]] = [[]]
    for sentence in sentences:
        if chunks[-1] and sum(map(len, chunks[-1])) + len(sentence) > chunk:
            chunks.append([])
        chunks[-1].append(sentence)
    carried: list[Ids] = []
    for number, each in enumerate(chunks):
        carried = carried + each
        if number == len(chunks) - 1:
            break
        text = [token for sentence in carried for token in sentence]
        begin = len(opening) + len(text)
        ids = opening + text + question + after
        attention = question_attention(model, ids, begin, begin + len(question), layer)[len(opening) :]
        carried = [
            carried[at]
            for at in picked_sentences(attention, [len(one) for one in carried], top, smoothing, most)
        ]
    return carried


@torch.no_grad()
def parallel_logits(model: PreTrainedModel, shared: Ids, windows: Sequence[Ids], task: Ids) -> Tensor:
    """Logits (len(task), vocabulary) of a task behind windows side by side, from one stock forward.

    Parameters
    ----------
    shared
        What every window begins with.
    windows
        Each from the position behind `shared` on, seeing that and itself.
    task
        From the position behind the longest window on, seeing everything.
    """
    places = [(-1, position) for position in range(len(shared))]
    for number, window in enumerate(windows):
        places += [(number, len(shared) + at) for at in range(len(window))]
    end = len(shared) + max(map(len, windows))
    places += [(len(windows), end + at) for at in range(len(task))]
    n = len(places)
    mask = torch.full((1, 1, n, n), torch.finfo(model.dtype).min, dtype=model.dtype)
    for i, (mine, here) in enumerate(places):
        for j, (its, there) in enumerate(places):
            is_task = mine == len(windows)
            if (its in (-1, mine) and there <= here) or (is_task and its < mine):
                mask[0, 0, i, j] = 0
    ids = [*shared, *(token for window in windows for token in window), *task]
    positions = torch.tensor([[position for _, position in places]])
    logits: Tensor = model(
        torch.tensor([ids]), attention_mask=mask, position_ids=positions, use_cache=False
    ).logits
    return logits[0, n - len(task) :]
