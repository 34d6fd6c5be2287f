"""What a change of weights is judged by: exact against whole matrices, and true to what it changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from everlong.memory import curvature as curvature_module
from everlong.memory import infinite_icl, own_texts
from everlong.memory.consolidation import consolidate, student
from everlong.memory.curvature import Curvature, measured
from everlong.memory.lessons import Lesson
from everlong.memory.progress import Progress
from everlong.reading.attached import AttachedModel
from tests.memory.students import lesson, plain_logits, student_of
from tests.memory.test_consolidation import HARD, SCHEDULE, config
from tests.memory.test_infinite_icl import learner_of, same
from tests.reference.curvature import reference_curvature

TEXTS = [
    lesson("The", " bees of Orla."),
    lesson("In", " it rains"),
    lesson("She said", " no, and no."),
    lesson("def ", "f(x):"),
]


@pytest.fixture(params=["llama", "gemma3_text"])
def model(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    with student_of(request.param) as made:
        yield made


def layers_of(adapted: Any) -> dict[str, Any]:
    return {name: module for name, module in adapted.named_modules() if hasattr(module, "lora_A")}


def change(adapted: Any, names: Any, size: float = 1e-2, seed: int = 0) -> dict[str, Tensor]:
    """Let some layers' adapters change something; return the changes of weights."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, layer in layers_of(adapted).items():
        first, second = layer.lora_A["memory"].weight, layer.lora_B["memory"].weight
        with torch.no_grad():
            second.copy_(
                size * torch.randn(second.shape, generator=generator) if name in names else second * 0
            )
        found[name] = (layer.scaling["memory"] * second @ first).detach().double()
    return found


def judged(model: AttachedModel, adapted: Any, texts: list[Lesson] = TEXTS, seed: int = 0) -> Curvature:
    return measured(model, adapted, texts, seed)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_it_is_that_of_whole_matrices(family: str) -> None:
    torch.manual_seed(3)
    apart = [replace(text, query=text.query[1:]) for text in TEXTS]  # what begins alike is run once
    with student_of(family) as model, student(model, config()) as adapted:
        curvature = judged(model, adapted, apart)
        layers = layers_of(adapted)
        texts = [(text.query, text.response) for text in apart]
        expected = reference_curvature(lambda ids: logits_with_gradient(model, ids), layers, texts)
        changes = change(adapted, layers)
        found = float(curvature.of(adapted)().detach())
        each = [
            0.5 * torch.trace(G @ changes[name] @ C @ changes[name].T) for name, (C, G) in expected.items()
        ]
        assert found == pytest.approx(len(each) * float(sum(each)), rel=1e-4)


def logits_with_gradient(model: AttachedModel, ids: list[int]) -> Tensor:
    inner: Any = model.attachment.model
    with torch.enable_grad():
        return inner(torch.tensor([ids]), use_cache=False).logits[0]


def test_it_tells_what_a_layer_changes_in_texts_of_the_model_itself(model: AttachedModel) -> None:
    texts = drawn(model, 40, 12)
    torch.manual_seed(3)
    with student(model, config()) as adapted:
        curvature = judged(model, adapted, texts)
        layers = list(layers_of(adapted))
        for name in layers[::3]:
            before = [log_probs(model, text) for text in texts]
            change(adapted, [name])
            after = [log_probs(model, text) for text in texts]
            apart = [
                (one.exp() * (one - other)).sum(-1).mean() for one, other in zip(before, after, strict=True)
            ]
            told = float(curvature.of(adapted)().detach()) / len(layers)
            assert 0.4 < told / float(torch.stack(apart).mean()) < 2.5
            change(adapted, [])


def drawn(model: AttachedModel, count: int, length: int) -> list[Lesson]:
    """Texts that the model writes, each token drawn from all that it may be: all of them at once."""
    inner: Any = model.attachment.model
    ids = torch.tensor([[256, 65 + number % 26] for number in range(count)])
    generator = torch.Generator().manual_seed(5)
    for _ in range(length):
        with torch.no_grad():
            logits = inner(ids, use_cache=False).logits[:, -1]
        probs = torch.softmax(logits.double(), -1)
        ids = torch.cat([ids, torch.multinomial(probs, 1, generator=generator)], 1)
    text = lesson("A", "b" * length)
    return [
        Lesson(text.pair, row[:2], row[2:], text.tokens, text.log_probs) for row in map(list, ids.tolist())
    ]


def log_probs(model: AttachedModel, text: Lesson) -> Tensor:
    logits = plain_logits(model, [*text.query, *text.response])
    return torch.log_softmax(logits[len(text.query) - 1 : -1].double(), -1)


def test_nothing_changed_is_nothing_and_a_measurement_leaves_nothing_behind(model: AttachedModel) -> None:
    with student(model, config()) as adapted:
        curvature = judged(model, adapted)
        assert float(curvature.of(adapted)().detach()) == 0.0
        assert all(parameter.grad is None for parameter in adapted.parameters())
        assert not any(module._forward_hooks for module in layers_of(adapted).values())


def test_many_tokens_are_told_by_some_sums_of_them(model: AttachedModel) -> None:
    texts = [lesson(f"{number}", " times it rained in Sligo.") for number in range(60)]
    with student(model, config()) as adapted:
        one, same, other = (judged(model, adapted, texts, seed) for seed in (1, 1, 2))
        assert change(adapted, layers_of(adapted))
        few, again, others = (float(curvature.of(adapted)().detach()) for curvature in (one, same, other))
        assert few == again != others
        assert few == pytest.approx(others, rel=0.2)
        assert all(len(factors.inputs) == 256 < sum(map(len, texts)) for factors in one.factors.values())


def test_the_sums_stand_for_all_tokens(model: AttachedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [lesson(f"{number}", " times it rained in Sligo.") for number in range(60)]
    with student(model, config()) as adapted:
        change(adapted, [])
        some = [judged(model, adapted, texts, seed) for seed in range(6)]
        monkeypatch.setattr(curvature_module, "_SUMS", 10**9)
        whole = judged(model, adapted, texts)
        change(adapted, layers_of(adapted))
        told = [float(curvature.of(adapted)().detach()) for curvature in some]
        assert sum(told) / len(told) == pytest.approx(float(whole.of(adapted)().detach()), rel=0.1)


def test_one_draw_of_signs_leads_where_all_tokens_would(
    model: AttachedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over draws is no help in training, which has one: its gradient must be nearly right."""
    texts = drawn(model, 60, 25)
    torch.manual_seed(3)
    with student(model, config()) as adapted:
        few = judged(model, adapted, texts)
        monkeypatch.setattr(curvature_module, "_SUMS", 10**9)
        whole = judged(model, adapted, texts)
        assert len(next(iter(few.factors.values())).inputs) < 300 < 60 * 25
        change(adapted, layers_of(adapted))
        parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        ours, theirs = (
            torch.cat([x.flatten() for x in torch.autograd.grad(curvature.of(adapted)(), parameters)])
            for curvature in (few, whole)
        )
        assert torch.cosine_similarity(ours, theirs, dim=0) > 0.9


def test_what_is_kept_of_it_is_nearly_all_of_it(model: AttachedModel) -> None:
    with student(model, config()) as adapted:
        known = judged(model, adapted)
        state = known.state()
        assert {tensor.element_size() for tensor in state.values()} == {2}
        again = Curvature.restored(state)
        change(adapted, layers_of(adapted))
        first, second = (float(one.of(adapted)().detach()) for one in (known, again))
        assert second == pytest.approx(first, rel=1e-2) and second > 0
        assert again.state().keys() == state.keys()
        assert all(torch.equal(kept, state[name]) for name, kept in again.state().items())
    assert not Curvature.restored(Curvature({}).state()).factors


def test_gradients_that_the_model_had_stay(model: AttachedModel) -> None:
    weight = model.attachment.model.get_input_embeddings().weight
    weight.grad = torch.ones_like(weight)
    with student(model, config()) as adapted:
        judged(model, adapted)
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_it_holds_a_student_in_training(model: AttachedModel) -> None:
    changed, losses = [], []
    for weight in (0.0, 1.0, 100.0):
        torch.manual_seed(1)
        with student(model, config()) as adapted:
            curvature = judged(model, adapted)
            parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
            penalty = curvature.of(adapted, weight) if weight else None
            losses.append(consolidate(model, parameters, HARD, SCHEDULE, penalty=penalty))
            changed.append(float(curvature.of(adapted)().detach()))
    assert changed[0] > 2 * changed[1] > 4 * changed[2] > 0
    assert losses[0] < losses[1] < losses[2]


# --- while a text is learned --------------------------------------------------------------------------


TEXT = "Orla Finch keeps bees in Sligo. She sells honey to Bennet. Bennet has thirty boats. " * 2


@pytest.fixture
def reader() -> Iterator[AttachedModel]:
    with student_of() as made:
        yield made


def test_a_text_is_learned_with_less_change_to_others(reader: AttachedModel) -> None:
    others, further = drawn(reader, 12, 20), []
    before = [log_probs(reader, text) for text in others]
    for weight in (0.0, 10.0):
        adapter = learner_of(reader, ewc=weight, anchors=0).learn(TEXT).adapters[-1]
        with student(reader, learner_of(reader).config()) as adapted:
            infinite_icl._load(adapted, adapter)
            after = [log_probs(reader, text) for text in others]
        apart = [(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(before, after, strict=True)]
        further.append(float(torch.stack(apart).mean()))
    assert further[0] > 1.5 * further[1] > 0


@pytest.mark.parametrize("carry", ["replay", "separate"])
def test_learning_is_taken_up_again_bit_by_bit(reader: AttachedModel, carry: Any) -> None:
    states: list[Progress] = []
    whole = learner_of(reader, ewc=2.0, carry=carry).learn(TEXT, on_segment=states.append)
    assert len(states) > 1
    assert same(learner_of(reader, ewc=2.0, carry=carry).learn(TEXT, start=states[0]), whole)
    assert not same(learner_of(reader, ewc=0.0, carry=carry).learn(TEXT), whole)


def test_a_model_is_measured_once_and_not_for_a_cartridge(
    reader: AttachedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []

    def count(model: AttachedModel, adapted: Any, texts: Sequence[Lesson]) -> Curvature:
        counted.append(len(texts))
        return measured(model, adapted, texts)

    monkeypatch.setattr(own_texts, "measured", count)
    learner_of(reader, ewc=1.0, passes=1).learn(TEXT)
    assert len(counted) == 1 and counted[0] > 40
    learner_of(reader, ewc=1.0, passes=1, kind="cartridge", prefix=4).learn(TEXT)
    assert len(counted) == 1


def test_a_model_that_writes_nothing_by_itself_learns_unjudged(
    reader: AttachedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_texts, "unrelated", lambda *_: [])
    ours, theirs = (learner_of(reader, ewc=weight, passes=1).learn(TEXT) for weight in (2.0, 0.0))
    assert same(ours, theirs)
