"""Lessons into parameters: an adapter learns to expect without the text what the teacher did with it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from everlong.attention import StreamCache
from everlong.errors import NumericalError
from everlong.memory.distillation import divergence
from everlong.memory.forest import in_batches, read_past, run_forest
from everlong.memory.lessons import Lesson, response_rows
from everlong.models.adapters import take_out_adapters, while_peft_wraps
from everlong.models.head import Head
from everlong.reading.attached import AttachedModel

_WARM_UP = 0.05  # of the steps


Past = Callable[[], StreamCache]


@dataclass(frozen=True)
class Schedule:
    """How long, in what steps, and how fast a student learns.

    Attributes
    ----------
    passes : int
        Through all lessons, at most.
    batch_tokens : int
        Tokens of a step.
    learning_rate : float
        The largest; it rises for a twentieth of the steps and falls along a cosine to a tenth.
    patience : int or None
        Passes without a better loss on held-out lessons after which to stop; None: never.
    hidden_weight : float
        Of the normalised distance between student's and teacher's last hidden states.
    seed : int
        Of the order of lessons.
    """

    passes: int
    batch_tokens: int
    learning_rate: float
    patience: int | None
    hidden_weight: float
    seed: int


@dataclass(frozen=True)
class Step:
    """One step of training.

    Attributes
    ----------
    number, of : int
        Which, and of how many.
    loss : float
        Nats per token of the responses.
    tokens : int
        Run in it.
    """

    number: int
    of: int
    loss: float
    tokens: int


def consolidate(
    model: AttachedModel,
    parameters: Sequence[torch.nn.Parameter],
    lessons: Sequence[Lesson],
    schedule: Schedule,
    *,
    anchors: Sequence[Sequence[Lesson]] = (),
    held_out: Sequence[Lesson] = (),
    past: Past | None = None,
    penalty: Callable[[], Tensor] | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> float:
    """Train `parameters` on `lessons`; return the loss on what was held out, or else of the last pass.

    Parameters
    ----------
    model : AttachedModel
        The student: whatever it runs with, `parameters` among it.
    parameters : sequence of Parameter
        What is trained.
    lessons, held_out : sequence of Lesson
        To learn from, and to tell when to stop. The best parameters on the latter are kept.
    anchors : sequence of sequences of Lesson
        What the student is held to: in each pass the next of these, and after the last the first again.
    schedule : Schedule
        How.
    past : callable, optional
        Returns, for each step, what the lessons' texts stand behind; None: nothing.
    penalty : callable, optional
        Returns what is added to the loss of each step, of the parameters alone, in nats per token; it is not
        part of the loss that is told.
    on_step : callable, optional
        Called after each step.

    Raises
    ------
    NumericalError
        The loss of a step, or its gradient, is not finite; the parameters are the latest with a finite loss.
    """
    shuffled = random.Random(schedule.seed)
    head = Head(model.attachment.model)
    turns = list(islice(cycle(anchors or [()]), schedule.passes))
    courses = [[*lessons, *turn] for turn in turns]
    steps = sum(len(in_batches(list(map(len, course)), schedule.batch_tokens)) for course in courses)
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=0.0)
    best, best_loss, since, number, latest = _copies(parameters), math.inf, 0, 0, math.inf
    good = best  # the latest that gave a finite loss
    for course in courses:
        shuffled.shuffle(course)
        total, count = 0.0, 0
        for batch in in_batches(list(map(len, course)), schedule.batch_tokens):
            some = [course[i] for i in batch]
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate * _pace(number, steps)
            loss = learn_from(model, head, some, schedule.hidden_weight, past)
            if penalty is not None:
                with torch.enable_grad():
                    penalty().backward()  # type: ignore[no-untyped-call]
            length = float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
            if math.isfinite(loss):
                good = _copies(parameters)
            if not (math.isfinite(loss) and math.isfinite(length)):
                _restore(parameters, good)
                raise NumericalError(
                    f"the loss or gradient of step {number + 1} is not finite: the adapter is kept "
                    f"as it last was good; use a learning rate below {schedule.learning_rate:g}, "
                    "or a dtype of 'float32'"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            number += 1
            size = sum(len(lesson.response) for lesson in some)
            total, count = total + loss * size, count + size
            if on_step is not None:
                on_step(Step(number, max(steps, number), loss, sum(map(len, some))))
        latest = total / count
        if held_out:
            latest = loss_of(model, head, held_out, schedule.batch_tokens, past)
            if latest < best_loss:
                best, best_loss, since = _copies(parameters), latest, 0
                continue
            since += 1
            if schedule.patience is not None and since >= schedule.patience:
                break
    if held_out and best_loss < math.inf:
        _restore(parameters, best)
        return best_loss
    return latest


def learn_from(
    model: AttachedModel,
    head: Head,
    lessons: Sequence[Lesson],
    hidden_weight: float = 0.0,
    past: Past | None = None,
) -> float:
    """Add the gradient of the mean loss on `lessons` to the parameters that want it; return the loss.

    The gradient of the hidden states is known before the decoder's backward begins.
    """
    with torch.enable_grad():
        hidden = _hidden(model, lessons, past)
    states = hidden.detach()
    tokens, log_probs, expected = _expected(lessons, states.device)
    loss, gradient = divergence(head, states, tokens, log_probs, gradient=True)
    assert gradient is not None
    if hidden_weight and expected is not None:
        length = states.norm(dim=-1, keepdim=True)
        own = states / length
        distance = (own - expected) * expected.any(-1, keepdim=True)  # nought: nothing is expected there
        loss = loss + hidden_weight * distance.square().sum(-1)
        along = (distance * own).sum(-1, keepdim=True) * own
        gradient = gradient + 2 * hidden_weight * (distance - along) / length
    mean = float(loss.mean())
    if math.isfinite(mean):
        hidden.backward(gradient / len(hidden))  # type: ignore[no-untyped-call]
    return mean


@torch.no_grad()
def loss_of(
    model: AttachedModel,
    head: Head,
    lessons: Sequence[Lesson],
    batch_tokens: int,
    past: Past | None = None,
) -> float:
    """Return the mean loss on lessons, in nats per token of the responses."""
    total, count = 0.0, 0
    for batch in in_batches([len(lesson) for lesson in lessons], batch_tokens):
        some = [lessons[i] for i in batch]
        hidden = _hidden(model, some, past)
        tokens, log_probs, _ = _expected(some, hidden.device)
        total += float(divergence(head, hidden, tokens, log_probs)[0].sum())
        count += len(hidden)
    return total / count


def _hidden(model: AttachedModel, lessons: Sequence[Lesson], past: Past | None) -> Tensor:
    """Return the student's hidden states that predict the responses, shape (n, d)."""
    begun = read_past(model, []) if past is None else past()
    hidden = run_forest(model, begun, [[*lesson.query, *lesson.response] for lesson in lessons])
    rows: Tensor = hidden[response_rows(lessons).to(hidden.device)]
    return rows


def _expected(lessons: Sequence[Lesson], device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what the teacher expects at the tokens of all responses: tokens, log-probabilities, states."""
    k = max(lesson.tokens.shape[1] for lesson in lessons)
    tokens = torch.cat([_widened(lesson.tokens, k, 0) for lesson in lessons]).to(device)
    log_probs = torch.cat([_widened(lesson.log_probs, k, -math.inf) for lesson in lessons]).to(device)
    known = next((lesson.hidden for lesson in lessons if lesson.hidden is not None), None)
    if known is None:
        return tokens, log_probs, None
    states = [
        known.new_zeros(len(lesson.response), known.shape[1]) if lesson.hidden is None else lesson.hidden
        for lesson in lessons
    ]
    return tokens, log_probs, torch.nn.functional.normalize(torch.cat(states).to(device), dim=-1)


def _widened(values: Tensor, k: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, k - values.shape[1]), value=fill)


def _pace(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step."""
    warm = max(1, round(_WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _copies(parameters: Sequence[torch.nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def _restore(parameters: Sequence[torch.nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


@contextmanager
def student(model: AttachedModel, config: Any, name: str = "memory") -> Iterator[Any]:
    """Give the model an adapter to be trained, as PEFT makes it, for the block; yield PEFT's model.

    What of the model wanted gradients before does so again afterwards.
    """
    from peft import get_peft_model

    base: Any = model.attachment.model
    config = replace(config, base_model_name_or_path=None)  # else PEFT warns that it is none it knows
    wanted = {parameter: parameter.requires_grad for parameter in base.parameters()}
    adapted: Any = None
    try:
        with while_peft_wraps():
            adapted = get_peft_model(base, config, adapter_name=name)
        adapted.eval()
        yield adapted
    finally:
        if adapted is None:  # interrupted: some layers may have it
            take_out_adapters(base)
        elif not config.is_prompt_learning:  # that puts nothing into the model
            adapted.unload()
        for parameter, wants in wanted.items():
            parameter.requires_grad_(wants)
