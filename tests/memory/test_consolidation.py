"""Learning: the loss falls, nothing but the adapter changes, and what was good is kept."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from everlong.errors import NumericalError
from everlong.memory import consolidation
from everlong.memory.consolidation import Schedule, Step, consolidate, learn_from, loss_of, student
from everlong.memory.lessons import Elicited, Lesson, Teacher
from everlong.memory.pairs import Pair
from everlong.models.anatomy import decoder_of
from everlong.models.head import Head
from everlong.reading.attached import AttachedModel
from tests.memory.students import lesson, student_of
from tests.reference.distillation import reference_divergence

HARD = [
    lesson("Orla", " keeps bees."),
    lesson("She", " sells honey."),
    lesson("Who keeps bees?", " Orla"),
    lesson("", "It rained."),
    lesson("W", "x"),
]
TEXT = "Orla keeps bees. She sells honey.\n\n"
SCHEDULE = Schedule(passes=6, batch_tokens=40, learning_rate=1e-2, patience=None, hidden_weight=0.0, seed=0)


@pytest.fixture
def model() -> Iterator[AttachedModel]:
    with student_of() as made:
        yield made


def config(**changes: Any) -> Any:
    from peft import LoraConfig

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(
        **{"r": 8, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM", **changes}
    )


def trained_parts(adapted: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in adapted.parameters() if parameter.requires_grad]


def soft(model: AttachedModel, hidden: bool = False) -> list[Lesson]:
    items = [
        Elicited(Pair(query, response, "cloze"), TEXT, query)
        for query, response in (("Orla", " keeps bees."), ("She", " sells honey."), ("O", "rla"))
    ]
    return Teacher(model, top_k=9, hidden=hidden).teach(items)


def learned(
    model: AttachedModel, lessons: Sequence[Lesson], schedule: Schedule = SCHEDULE, **options: Any
) -> tuple[float, list[Tensor]]:
    """Train a new adapter; return the loss and its parameters."""
    torch.manual_seed(1)
    with student(model, config()) as adapted:
        parameters = trained_parts(adapted)
        loss = consolidate(model, parameters, lessons, schedule, **options)
        return loss, [parameter.detach().clone() for parameter in parameters]


def test_the_loss_falls_step_by_step(model: AttachedModel) -> None:
    steps: list[Step] = []
    loss, _ = learned(model, HARD, replace(SCHEDULE, passes=15), on_step=steps.append)
    assert loss < 0.5 * steps[0].loss
    assert [step.number for step in steps] == list(range(1, len(steps) + 1))
    assert all(step.of >= step.number for step in steps) and steps[-1].of == steps[-1].number
    sizes = sum(map(len, HARD))
    assert sum(step.tokens for step in steps) == 15 * sizes


@pytest.mark.parametrize("hidden_weight", [0.0, 0.5])
def test_a_step_goes_by_the_mean_over_tokens_of_the_definition(
    model: AttachedModel, hidden_weight: float
) -> None:
    lessons = soft(model, hidden=hidden_weight > 0)
    parameter = model.attachment.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    total, count = torch.zeros((), dtype=torch.float64), 0
    for one in lessons:
        ids = torch.tensor([[*one.query, *one.response]])
        inner: Any = model.attachment.model
        rows = slice(len(one.query) - 1, -1)
        told = [
            dict(zip(words, probs, strict=True))
            for words, probs in zip(one.tokens.tolist(), one.log_probs.double().exp().tolist(), strict=True)
        ]
        total = total + reference_divergence(told, inner(ids).logits[0, rows]).sum()
        if one.hidden is not None:
            states = decoder_of(inner)(input_ids=ids).last_hidden_state[0, rows]
            away = states / states.norm(dim=-1, keepdim=True)
            away = away - one.hidden / one.hidden.norm(dim=-1, keepdim=True)
            total = total + hidden_weight * away.square().sum()
        count += len(one.response)
    (expected,) = torch.autograd.grad(total / count, parameter)
    loss = learn_from(model, Head(model.attachment.model), lessons, hidden_weight)
    assert loss == pytest.approx(float(total.detach()) / count, rel=1e-4)
    assert parameter.grad is not None and expected.abs().max() > 1e-3
    torch.testing.assert_close(parameter.grad, expected, atol=1e-3 * float(expected.abs().max()), rtol=1e-3)


def test_the_mean_loss_is_that_of_all_tokens_however_they_are_batched(model: AttachedModel) -> None:
    head, lessons = Head(model.attachment.model), soft(model)
    whole = loss_of(model, head, lessons, 1000)
    assert loss_of(model, head, lessons, 16) == pytest.approx(whole, rel=1e-5)
    alone = [loss_of(model, head, [one], 1000) * len(one.response) for one in lessons]
    assert whole == pytest.approx(sum(alone) / sum(len(one.response) for one in lessons), rel=1e-5)


def test_lessons_of_different_width_are_learned_together(model: AttachedModel) -> None:
    head = Head(model.attachment.model)
    mixed = [*soft(model), *HARD[:2]]
    parts = [
        loss_of(model, head, some, 1000) * sum(len(x.response) for x in some)
        for some in (mixed[:3], HARD[:2])
    ]
    assert loss_of(model, head, mixed, 1000) == pytest.approx(
        sum(parts) / sum(len(x.response) for x in mixed), rel=1e-5
    )


def test_nothing_but_the_adapter_changes(model: AttachedModel) -> None:
    base = model.attachment.model
    frozen = {"model.embed_tokens.weight", "lm_head.weight"}
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name not in frozen)
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    attributes, modules = set(base.__dict__), [type(module) for module in base.modules()]
    loss, adapter = learned(model, HARD)
    assert math.isfinite(loss) and any(part.abs().max() > 0 for part in adapter[1::2]), "B was trained"
    after = dict(base.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name for name, parameter in after.items() if not parameter.requires_grad} == frozen
    assert all(parameter.grad is None for parameter in after.values())
    assert [type(module) for module in base.modules()] == modules
    assert set(base.__dict__) == attributes
    assert not base.training


def test_an_error_leaves_nothing_on_the_model_either(model: AttachedModel) -> None:
    base = model.attachment.model
    names = [name for name, _ in base.named_parameters()]
    with pytest.raises(KeyboardInterrupt), student(model, config()):
        raise KeyboardInterrupt
    assert [name for name, _ in base.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in base.parameters())


def spoiled_at(step: int, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Let the loss, or its gradient, of a step (from 1 on) be no number."""
    numbers = itertools.count(1)
    whole = consolidation.divergence

    def spoiled(*arguments: Any, **options: Any) -> Any:
        loss, gradient = whole(*arguments, **options)
        if next(numbers) == step:
            (loss if part == "loss" else gradient).fill_(torch.nan)
        return loss, gradient

    monkeypatch.setattr(consolidation, "divergence", spoiled)


@pytest.mark.parametrize("part", ["loss", "gradient"])
@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_loss_that_is_not_finite_is_an_error_and_the_last_good_adapter_is_kept(
    model: AttachedModel, step: int, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled_at(step, monkeypatch, part)
    seen: list[list[Tensor]] = []
    torch.manual_seed(1)
    schedule = replace(SCHEDULE, batch_tokens=1000, passes=4)
    with student(model, config()) as adapted:
        parameters = trained_parts(adapted)
        seen.append([parameter.detach().clone() for parameter in parameters])

        def on_step(step: Step) -> None:
            seen.append([parameter.detach().clone() for parameter in parameters])

        with pytest.raises(NumericalError, match=rf"step {step} is not finite.*learning rate below 0.01"):
            consolidate(model, parameters, HARD, schedule, on_step=on_step)
        kept = seen[max(0, step - 2)] if part == "loss" else seen[step - 1]
        assert all(torch.equal(ours, good) for ours, good in zip(parameters, kept, strict=True))


def test_parameters_that_blow_up_are_not_kept(model: AttachedModel) -> None:
    """The step that ruins the weights shows only in the next step's loss."""
    torch.manual_seed(1)
    with student(model, config()) as adapted:
        parameters = trained_parts(adapted)

        def ruin(step: Step) -> None:
            if step.number == 2:
                with torch.no_grad():
                    parameters[3].fill_(torch.inf)

        with pytest.raises(NumericalError):
            consolidate(model, parameters, HARD, replace(SCHEDULE, batch_tokens=1000), on_step=ruin)
        assert all(parameter.isfinite().all() for parameter in parameters)
        head = Head(model.attachment.model)
        assert math.isfinite(loss_of(model, head, HARD, 1000))


def test_the_best_on_what_is_held_out_is_kept(model: AttachedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 2.0, 2.5, 1.5, 1.6, 1.7, 1.0])
    parts: list[list[Tensor]] = []
    torch.manual_seed(1)
    with student(model, config()) as adapted:
        parameters = trained_parts(adapted)

        def told(*_: Any) -> float:
            parts.append([parameter.detach().clone() for parameter in parameters])
            return next(losses)

        monkeypatch.setattr(consolidation, "loss_of", told)
        schedule = replace(SCHEDULE, passes=7, patience=2)
        assert consolidate(model, parameters, HARD[:3], schedule, held_out=HARD[3:]) == 1.5
        assert len(parts) == 6, "patience ended after the second pass that was no better"
        assert all(torch.equal(ours, best) for ours, best in zip(parameters, parts[3], strict=True))
        assert not torch.equal(parts[3][1], parts[5][1])


def test_hidden_states_are_taught_beside_lessons_that_have_none(model: AttachedModel) -> None:
    head = Head(model.attachment.model)
    told, untold = soft(model, hidden=True)[:2], HARD[:2]

    def gradient(lessons: list[Lesson], weight: float) -> Tensor:
        torch.manual_seed(0)
        with student(model, config()) as adapted:
            parameters = trained_parts(adapted)
            learn_from(model, head, lessons, weight)
            return torch.cat([parameter.grad.flatten() for parameter in parameters])

    both, rows = [*told, *untold], [sum(len(x.response) for x in some) for some in (told, untold)]
    added = gradient(both, 1.0) - gradient(both, 0.0)
    alone = gradient(told, 1.0) - gradient(told, 0.0)
    assert float(added.abs().max()) > 0
    torch.testing.assert_close(added, alone * rows[0] / sum(rows), rtol=1e-3, atol=1e-7)


def test_held_out_lessons_are_not_learned(model: AttachedModel) -> None:
    schedule = replace(SCHEDULE, passes=1)
    alone, beside = learned(model, HARD[:3], schedule), learned(model, HARD[:3], schedule, held_out=HARD[3:])
    assert all(torch.equal(a, b) for a, b in zip(alone[1], beside[1], strict=True))
    assert alone[0] != beside[0], "the one is the loss on what was learned, the other on what was held out"


@pytest.mark.parametrize("turns", [[], [[]], [[2]], [[2, 3], [4]], [[2], [3], [4], [2, 4], [3]]])
def test_each_pass_has_the_next_anchors(
    model: AttachedModel, turns: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lessons, anchors, passes = HARD[:2], [[HARD[i] for i in turn] for turn in turns], 4
    seen: list[Lesson] = []

    def note(*arguments: Any, **_: Any) -> float:
        seen.extend(arguments[2])
        return 1.0

    monkeypatch.setattr(consolidation, "learn_from", note)
    learned(model, lessons, replace(SCHEDULE, passes=passes), anchors=anchors)
    for number in range(passes):
        expected = [*lessons, *(anchors[number % len(anchors)] if anchors else [])]
        own, seen = seen[: len(expected)], seen[len(expected) :]
        assert sorted(map(id, own)) == sorted(map(id, expected))
    assert not seen


def test_the_same_seed_gives_the_same_adapter(model: AttachedModel) -> None:
    once, again = learned(model, HARD), learned(model, HARD)
    other = learned(model, HARD, replace(SCHEDULE, seed=1))
    assert once[0] == again[0]
    assert all(torch.equal(a, b) for a, b in zip(once[1], again[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(once[1], other[1], strict=True))


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_neox", "gemma2", "qwen3_moe"])
def test_other_families_learn_too(family: str) -> None:
    with student_of(family) as model:
        layers = {
            name.rpartition(".")[2]
            for name, module in model.attachment.decoder.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        steps: list[Step] = []
        with student(model, config(target_modules=sorted(layers))) as adapted:
            loss = consolidate(
                model, trained_parts(adapted), HARD, replace(SCHEDULE, passes=10), on_step=steps.append
            )
        assert loss < 0.8 * steps[0].loss


def test_a_packed_model_learns_by_its_float_weights(model: AttachedModel) -> None:
    expected = learned(model, HARD)
    with student_of(packed=True) as packed:
        types = [type(module) for module in packed.attachment.model.modules()]
        found = learned(packed, HARD)
        assert [type(module) for module in packed.attachment.model.modules()] == types
    assert found[0] == expected[0]
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))
