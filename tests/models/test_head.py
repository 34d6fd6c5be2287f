"""The head by itself: the model's own logits and surprisals, without holding those of a whole chunk."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from everlong.attention import LMInfinite, attach
from everlong.errors import UnsupportedModelError
from everlong.models import head as head_module
from everlong.models.anatomy import decoder_of
from everlong.models.head import Head
from tests.evaluation.expected import stock_logits, surprisal_of
from tests.tiny import FAMILIES, VOCAB, build, random_ids

IDS = random_ids(1, 40)[0]


@torch.no_grad()
def hidden_of(model: Any, ids: Tensor = IDS) -> Tensor:
    hidden: Tensor = decoder_of(model)(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    return hidden


@pytest.mark.parametrize("family", FAMILIES)
def test_its_logits_and_surprisals_are_the_models_own(family: str) -> None:
    model = build(family)
    head, hidden, theirs = Head(model), hidden_of(model), stock_logits(model, IDS)
    assert torch.allclose(head.logits(hidden), theirs, atol=1e-5)
    surprisal = head.surprisal(hidden[:-1], IDS[1:])
    assert surprisal.dtype == torch.float32
    assert torch.allclose(surprisal, surprisal_of(theirs, IDS)[1:], atol=1e-4)


@pytest.mark.parametrize("block", [1, 7 * 39, 7 * 39 + 1, 96 * 39, 97 * 39])
def test_blocks_of_the_vocabulary_change_nothing_and_bound_what_is_held(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("gemma2")
    head, hidden = Head(model), hidden_of(model)
    targets = IDS[1:].clone()
    targets[:8] = torch.tensor([0, 6, 7, 8, 13, 14, 95, 96])  # first and last of blocks
    logs = stock_logits(model, IDS)[:-1].double().log_softmax(-1)
    expected = torch.tensor([-float(logs[i, token]) for i, token in enumerate(targets)])
    sizes = []
    logits = Head.block

    def watched(self: Head, *arguments: Any) -> Tensor:
        found = logits(self, *arguments)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(head_module, "_BLOCK", block)
    monkeypatch.setattr(Head, "block", watched)
    assert torch.allclose(head.surprisal(hidden[:-1], targets), expected.float(), atol=1e-4)
    assert max(sizes) <= max(block, 39) and sum(sizes) == 39 * VOCAB


def test_no_hidden_state_has_no_surprisal() -> None:
    model = build("llama")
    assert Head(model).surprisal(hidden_of(model)[:0], IDS[:0]).shape == (0,)


def test_a_uniform_head_needs_the_logarithm_of_the_vocabulary() -> None:
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    surprisal = Head(model).surprisal(hidden_of(model)[:-1], IDS[1:])
    assert torch.allclose(surprisal, torch.full((39,), math.log(VOCAB)))


def test_half_precision_is_scored_in_float32() -> None:
    model = build("llama").to(torch.bfloat16)
    head, hidden, theirs = Head(model), hidden_of(model), stock_logits(model, IDS)
    surprisal = head.surprisal(hidden[:-1], IDS[1:])
    assert surprisal.dtype == head.logits(hidden).dtype == torch.float32
    assert torch.allclose(surprisal, surprisal_of(theirs.float(), IDS)[1:], atol=0.1)


def test_an_attached_model_has_the_same_head() -> None:
    model = build("granite")
    with attach(model, LMInfinite(window=20, sinks=3)):
        head = Head(model)
    assert torch.allclose(head.logits(hidden_of(model)), stock_logits(model, IDS), atol=1e-5)


def test_an_adapter_is_looked_through() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = build("granite")
    plain = stock_logits(model, IDS)
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, adapter).eval()
    logits = Head(adapted).logits(hidden_of(adapted))
    assert torch.allclose(logits, stock_logits(adapted, IDS), atol=1e-5)
    assert not torch.allclose(logits, plain, atol=1e-2)


@pytest.mark.parametrize(
    ("setting", "value"), [("final_logit_softcapping", 2.0), ("logit_scale", 0.5), ("logits_scaling", 3.0)]
)
def test_a_head_that_does_something_else_is_refused_by_name(setting: str, value: float) -> None:
    model = build("llama")
    setattr(model.config, setting, value)  # what the configuration says the model does not do
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM.*soft-cap"):
        Head(model)
