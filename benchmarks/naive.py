"""The naive loop of learning a text, written plainly on stock transformers: what Everlong's is compared with.

Every text is written by itself, behind all that stands before it, which is read anew. For every pair the
teacher reads the segment anew, the student the query, and the logits of both are computed of every token,
over the whole vocabulary; the teacher's are kept in float32. The student is trained on padded batches of as
many tokens, its logits whole. What comes out is the same: the same pairs, gains and targets.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from everlong.memory.forest import in_batches
from everlong.memory.lessons import Elicited, Lesson, as_tokens
from everlong.memory.recipes import Recipe
from everlong.models.cache_argument import cache_argument
from everlong.reading.attached import AttachedModel

_NEVER = -1e4  # the logit of a token that cannot come


class Writer:
    """Writes texts greedily, one after the other, as Everlong's writer does many at a time."""

    def __init__(self, model: Any, tokens: AttachedModel) -> None:
        self.model = model
        self.tokens = tokens

    def write(
        self,
        beginning: str,
        prompts: Sequence[str],
        max_new_tokens: int,
        stop: Sequence[str] = ("\n",),
        *,
        passages: Sequence[str] | None = None,
    ) -> list[str]:
        """Return what the model writes after each prompt."""
        coder = self.tokens.coder
        texts = []
        for number, prompt in enumerate(prompts):
            ids = list(coder.bos)
            for part in (beginning, passages[number] if passages else "", prompt):
                ids += coder.encode_after(part) if len(ids) > len(coder.bos) else coder.encode(part)
            texts.append(self._go_on(ids, max_new_tokens, stop))
        return texts

    @torch.no_grad()
    def _go_on(self, ids: list[int], most: int, stop: Sequence[str]) -> str:
        decode, cache = self.tokens.tokenizer.decode, DynamicCache(config=self.model.config)
        given, new, text = ids, [], ""
        for _ in range(most):
            call = {"use_cache": True, "logits_to_keep": 1, cache_argument(self.model): cache}
            logits = self.model(torch.tensor([given]), **call).logits
            given = [int(logits[0, -1].argmax())]
            if given[0] in self.tokens.end_tokens:
                break
            new += given
            text = decode(ids[-1:] + new)[len(decode(ids[-1:])) :]
            ends = [text.index(each) for each in stop if each in text]
            if ends:
                return text[: min(ends)]
        return text


@torch.no_grad()
def teach(model: Any, tokens: AttachedModel, elicited: Sequence[Elicited]) -> list[Lesson]:
    """Return pairs with their gains; `log_probs` holds the teacher's logits, shape (n, vocabulary)."""
    coder, lessons = tokens.coder, []
    for item in elicited:
        lesson = as_tokens(tokens, item)
        if not lesson.words:
            continue
        n = len(lesson.response)
        begun = [*coder.bos, *coder.encode(item.beginning)]
        asked = [*begun, *coder.encode_after(item.question)]
        untold = lesson.query if item.untold is None else [*begun, *coder.encode_after(item.untold)]
        logits = [
            model(torch.tensor([[*before, *lesson.response]]), use_cache=False).logits[0, -n - 1 : -1].float()
            for before in (asked, untold)
        ]
        told, alone = (
            float(some.log_softmax(-1)[range(lesson.words), lesson.response[: lesson.words]].mean())
            for some in logits
        )
        kept = logits[0].clone()
        if lesson.ends:
            kept[-1] = _NEVER
            kept[-1, lesson.response[-1]] = 0.0
        pair = dataclasses.replace(lesson.pair, gain=told - alone)
        lessons.append(dataclasses.replace(lesson, pair=pair, log_probs=kept))
    return lessons


def learn(
    student: Any,
    parameters: Sequence[torch.nn.Parameter],
    lessons: Sequence[Lesson],
    recipe: Recipe,
    seed: int,
) -> float:
    """Train on lessons, as long and in steps as large as the recipe says; return the last step's loss."""
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    draw, loss = random.Random(seed), torch.zeros(())
    for _ in range(recipe.passes):
        order = draw.sample(list(lessons), len(lessons))
        for batch in in_batches([len(lesson) for lesson in order], recipe.batch_tokens):
            some = [order[i] for i in batch]
            loss = divergence(student, some)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def divergence(student: Any, lessons: Sequence[Lesson]) -> Tensor:
    """Return the mean divergence from the teacher's whole distributions to the student's, in nats a token."""
    texts = [torch.tensor([*lesson.query, *lesson.response]) for lesson in lessons]
    ids = pad_sequence(texts, batch_first=True)
    mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    logits = student(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    found = []
    for row, lesson in zip(logits, lessons, strict=True):
        end = len(lesson) - 1
        said = row[end - len(lesson.response) : end].log_softmax(-1)
        taught = lesson.log_probs.log_softmax(-1)
        found.append((taught.exp() * (taught - said)).sum(-1))
    return torch.cat(found).mean()
