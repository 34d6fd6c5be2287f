"""The loss: what the definition gives, whatever the head, and however the vocabulary is cut."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from everlong.memory import distillation
from everlong.memory.distillation import divergence, likeliest
from everlong.models.anatomy import decoder_of
from everlong.models.head import Head
from tests.reference.distillation import reference_divergence
from tests.tiny import build, random_ids

WORDS = 700  # more than two of the smallest blocks
HEADS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 4.0},
    "granite": {"logits_scaling": 2.0},
    "cohere2": {"logit_scale": 0.5},
    "phi": {},  # has a bias
}
IDS = random_ids(1, 9, vocab=WORDS)


@pytest.fixture(scope="module", params=HEADS)
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param, vocab_size=WORDS, **HEADS[request.param])


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "_BLOCK", 1)


@torch.no_grad()
def hidden_of(model: Any) -> Tensor:
    hidden: Tensor = decoder_of(model)(input_ids=IDS, use_cache=False).last_hidden_state[0]
    return hidden


def own_logits(model: Any, hidden: Tensor) -> Tensor:
    """What the model makes of these hidden states, by its own code."""

    def put(module: Any, args: Any, output: Any) -> Any:
        output.last_hidden_state = hidden[None]
        return output

    hook = decoder_of(model).register_forward_hook(put)
    try:
        logits: Tensor = model(input_ids=IDS, use_cache=False).logits[0]
    finally:
        hook.remove()
    return logits


def told(tokens: Tensor, log_probs: Tensor) -> list[dict[int, float]]:
    """A teacher's tensors as the reference takes them."""
    return [
        {word: p for word, p in zip(words, probs, strict=True) if p > 0}
        for words, probs in zip(tokens.tolist(), log_probs.double().exp().tolist(), strict=True)
    ]


def teacher(k: int, sharpness: float = 1.0) -> tuple[Tensor, Tensor]:
    logits = torch.randn(len(IDS[0]), WORDS, generator=torch.Generator().manual_seed(4)) * sharpness
    log_probs, tokens = logits.log_softmax(-1).topk(k)
    return tokens, log_probs


def check(model: Any, tokens: Tensor, log_probs: Tensor, sureness: float = 1.0) -> Tensor:
    """Hold loss and gradient against the reference; return the loss."""
    hidden = (sureness * hidden_of(model)).requires_grad_()
    expected = reference_divergence(told(tokens, log_probs), own_logits(model, hidden))
    (slope,) = torch.autograd.grad(expected.sum(), hidden)
    loss, gradient = divergence(Head(model), hidden.detach(), tokens, log_probs, gradient=True)
    torch.testing.assert_close(loss.double(), expected.detach(), atol=2e-4, rtol=1e-4)
    assert gradient is not None
    torch.testing.assert_close(gradient, slope, atol=2e-4 * float(slope.abs().max()), rtol=1e-3)
    without, nothing = divergence(Head(model), hidden.detach(), tokens, log_probs)
    assert nothing is None and torch.equal(without, loss)
    return loss


@pytest.mark.parametrize("k", [1, 12, WORDS])
@pytest.mark.parametrize("sharpness", [0.5, 4.0])
def test_value_and_gradient_are_those_of_the_definition(model: Any, k: int, sharpness: float) -> None:
    assert (check(model, *teacher(k, sharpness)) >= 0).all()


@pytest.mark.usefixtures("small_blocks")
def test_so_they_are_over_blocks_of_the_vocabulary(model: Any) -> None:
    check(model, *teacher(12))


@pytest.mark.parametrize("block", [1, 2**21], ids=["small blocks", "one block"])
@pytest.mark.parametrize("family", HEADS)
def test_so_they_are_where_most_words_are_left_out_of_the_gradient(
    family: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    softcap = {"final_logit_softcapping": 100.0} if family == "gemma2" else {}
    model = build(family, vocab_size=WORDS, **{**HEADS[family], **softcap})
    monkeypatch.setattr(distillation, "_BLOCK", block)
    sureness = 60 / float(own_logits(model, hidden_of(model)).detach().abs().max())
    chances = own_logits(model, sureness * hidden_of(model)).softmax(-1)
    assert (chances > distillation._LEAST).any(0).sum() < WORDS / 2
    check(model, *teacher(12), sureness)
    check(model, *teacher(1, 4.0), sureness)


def test_what_the_teacher_leaves_to_words_that_the_student_rules_out_is_learned() -> None:
    """Their chances are small, and what the loss makes of them is not."""
    draws, words, known, size = torch.Generator().manual_seed(0), 20_000, 12, 32
    model = build("llama", vocab_size=words, hidden_size=size)
    head = Head(model)
    head.weight = torch.randn(words, size, generator=draws) * 0.15
    head.weight[:, 0], head.weight[:, 1] = 0.0, head.weight[:, 1] + 0.5
    head.weight[:known, 0] = math.log(words / known / 1e-3) / 4
    hidden = torch.randn(9, size, generator=draws) * 0.3
    hidden[:, 0] = 4.0
    tokens = torch.arange(known).repeat(9, 1)
    log_probs = torch.full((9, known), math.log(0.9 / known))
    student = hidden.double().requires_grad_()
    rest = 1 - (student @ head.weight.double().T).softmax(-1)[:, :known].sum(-1)
    chances = (student @ head.weight.double().T).log_softmax(-1)[:, :known]
    expected = (log_probs.double().exp() * (log_probs.double() - chances)).sum(-1) + 0.1 * (0.1 / rest).log()
    (slope,) = torch.autograd.grad(expected.sum(), student)
    gradient = divergence(head, hidden, tokens, log_probs, gradient=True)[1]
    assert gradient is not None
    assert ((gradient - slope).norm(dim=-1) < 3e-3 * slope.norm(dim=-1)).all()


def test_blocks_change_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = divergence(Head(model), hidden_of(model), *teacher(30), gradient=True)
    sizes = []
    block = Head.block

    def watched(self: Head, *arguments: Any) -> Tensor:
        found = block(self, *arguments)
        sizes.append(found.shape[1])
        return found

    head = Head(model)
    monkeypatch.setattr(Head, "block", watched)
    monkeypatch.setattr(distillation, "_BLOCK", 1)
    for ours, theirs in zip(
        divergence(head, hidden_of(model), *teacher(30), gradient=True), whole, strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert sizes == [256, 256, WORDS - 512]


def test_words_of_no_probability_are_not_told(model: Any) -> None:
    tokens, log_probs = teacher(6)
    log_probs[:, 4:] = -torch.inf
    tokens[:, 4:] = 0
    loss = check(model, tokens, log_probs)
    assert torch.equal(loss, divergence(Head(model), hidden_of(model), tokens[:, :4], log_probs[:, :4])[0])


def test_a_teacher_that_tells_nothing_teaches_nothing() -> None:
    model = build("llama", vocab_size=WORDS)
    tokens, log_probs = teacher(3)
    loss, gradient = divergence(
        Head(model), hidden_of(model), tokens, log_probs.fill_(-torch.inf), gradient=True
    )
    assert gradient is not None
    assert torch.allclose(loss, torch.zeros(9), atol=1e-6) and gradient.abs().max() < 1e-4


def test_hard_targets_give_the_cross_entropy(model: Any) -> None:
    hidden, targets = hidden_of(model), random_ids(1, 9, seed=2, vocab=WORDS)[0]
    loss = check(model, targets[:, None], torch.zeros(9, 1))
    expected = torch.nn.functional.cross_entropy(own_logits(model, hidden), targets, reduction="none")
    torch.testing.assert_close(loss, expected.detach(), atol=1e-4, rtol=1e-4)


def test_a_teacher_that_is_the_student_costs_nothing(model: Any) -> None:
    hidden, head = hidden_of(model), Head(model)
    tokens, log_probs, _ = likeliest(head, hidden, 20)
    loss, gradient = divergence(head, hidden, tokens, log_probs, gradient=True)
    assert gradient is not None
    assert loss.abs().max() < 1e-5 and gradient.abs().max() < 1e-4


@pytest.mark.parametrize("block", [1, 2**21], ids=["small blocks", "one block"])
@pytest.mark.parametrize("k", [1, 20, 300, WORDS])
def test_the_likeliest_are_those_of_all_logits(
    model: Any, k: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "_BLOCK", block)
    hidden = hidden_of(model)
    logits = own_logits(model, hidden).detach()
    tokens, log_probs, total = likeliest(Head(model), hidden, k)
    expected = logits.log_softmax(-1).topk(k).values
    torch.testing.assert_close(log_probs, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits.log_softmax(-1).gather(1, tokens), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(total, logits.logsumexp(-1), atol=1e-4, rtol=1e-4)
    assert all(len(set(row)) == k for row in tokens.tolist())
