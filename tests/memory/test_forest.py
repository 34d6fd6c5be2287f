"""Texts run together: each as if it alone had followed the past, which does not notice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from everlong.memory import forest
from everlong.memory.forest import in_batches, read_past, run_forest
from everlong.reading.attached import AttachedModel
from tests.memory.students import read_nothing, student_of
from tests.tiny import BYTE_VOCAB, YARN, random_ids

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped heads": ("llama", {}),
    "partial rotary": ("gpt_neox", {}),
    "local layers": ("gemma3_text", {}),
    "local layers, soft-cap": ("gemma2", {}),
    "shared layers": ("gemma4_text", {}),
    "layers without rotary": ("smollm3", {}),
    "sinks of its own": ("gpt_oss", {}),
    "scaled by position": ("ministral3", {}),
    "experts": ("qwen3_moe", {}),
    "stretched": ("llama", YARN),
}
PASTS = {"no past": 0, "a past": 5, "a past beyond the local window": 30}
LENGTHS = (1, 12, 3, 20, 1, 7)  # the fourth beyond the local window


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest) -> Iterator[AttachedModel]:
    family, config = CASES[request.param]
    with student_of(family, **config) as made:
        yield made


def ids(length: int, seed: int) -> list[int]:
    found: list[int] = random_ids(1, length, seed, BYTE_VOCAB)[0].tolist()
    return found


TEXTS = [ids(length, seed) for seed, length in enumerate(LENGTHS, 10)]


def alone(model: AttachedModel, before: list[int], text: list[int]) -> Tensor:
    """Hidden states of one text, read behind the past in one forward of its own."""
    decoder: Any = model.attachment.decoder
    call = {model.attachment.cache_argument: read_nothing(model)}
    hidden: Tensor = decoder(input_ids=torch.tensor([[*before, *text]]), **call).last_hidden_state[0]
    return hidden[len(before) :]


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("length", PASTS.values(), ids=PASTS)
@torch.no_grad()
def test_each_text_is_as_if_it_were_alone(model: AttachedModel, length: int) -> None:
    before = ids(length, 1)
    past = read_past(model, before)
    for _ in range(2):  # the second time, the past is still what it was
        together = run_forest(model, past, TEXTS)
        for ours, text in zip(torch.split(together, LENGTHS), TEXTS, strict=True):
            close(ours, alone(model, before, text))


@pytest.mark.parametrize("length", PASTS.values(), ids=PASTS)
@torch.no_grad()
def test_the_past_stays_as_it_is(model: AttachedModel, length: int) -> None:
    past, untouched = read_past(model, ids(length, 1)), read_past(model, ids(length, 1))
    run_forest(model, past, TEXTS)
    assert past.seen == untouched.seen == length
    held, expected = past.state(), untouched.state()
    assert held[0].keys() == expected[0].keys()
    assert all(torch.equal(held[0][name], expected[0][name]) for name in held[0])
    assert {**held[1], "rows": None} == {**expected[1], "rows": None}


@pytest.mark.parametrize("length", PASTS.values(), ids=PASTS)
def test_gradients_are_those_of_forwards_of_their_own(model: AttachedModel, length: int) -> None:
    before = ids(length, 1)
    parameters = list(model.attachment.model.parameters())
    wanted = [p for name, p in model.attachment.decoder.named_parameters() if "layers." in name]
    draws = torch.Generator().manual_seed(0)
    past = read_past(model, before)
    ours = run_forest(model, past, TEXTS)
    towards = torch.randn(ours.shape, generator=draws)
    found = torch.autograd.grad((ours * towards).sum(), wanted, allow_unused=True)
    with_past = [torch.zeros_like(p) for p in wanted]
    for text, own in zip(TEXTS, torch.split(towards, LENGTHS), strict=True):
        call = {model.attachment.cache_argument: read_past(model, before)}
        decoder: Any = model.attachment.decoder
        hidden = decoder(input_ids=torch.tensor([text]), use_cache=True, **call).last_hidden_state[0]
        for total, one in zip(
            with_past,
            torch.autograd.grad((hidden * own).sum(), wanted, allow_unused=True),
            strict=True,
        ):
            if one is not None:
                total += one
    assert any(total.abs().max() > 0.1 for total in with_past)
    for one, total in zip(found, with_past, strict=True):
        scale = float(total.abs().max())
        torch.testing.assert_close(
            torch.zeros_like(total) if one is None else one, total, atol=1e-3 * scale + 1e-6, rtol=1e-2
        )
    assert all(p.grad is None for p in parameters)


@torch.no_grad()
def test_a_long_past_is_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    with student_of("gemma3_text") as model:
        monkeypatch.setattr(forest, "_CHUNK", 7)
        past = read_past(model, ids(40, 1))
        close(run_forest(model, past, TEXTS[1:2]), alone(model, ids(40, 1), TEXTS[1]))


@torch.no_grad()
def test_an_error_in_the_model_does_not_leave_texts_on_the_past() -> None:
    with student_of() as model:
        past = read_past(model, ids(9, 1))

        def fail(*_: Any) -> None:
            raise RuntimeError("out of memory")

        hook = model.attachment.decoder.layers[1].register_forward_pre_hook(fail)  # type: ignore[union-attr]
        with pytest.raises(RuntimeError, match="out of memory"):
            run_forest(model, past, TEXTS)
        hook.remove()
        assert past.seen == 9 and not past.is_provisional


@pytest.mark.parametrize(
    ("lengths", "most", "expected"),
    [
        ([], 10, []),
        ([3, 4, 3, 1], 10, [[0, 1, 2], [3]]),
        ([30, 5], 10, [[0], [1]]),
        ([5, 30, 5, 5], 10, [[0], [1], [2, 3]]),
        ([10, 10], 10, [[0], [1]]),
    ],
)
def test_batches_are_filled_in_order(lengths: list[int], most: int, expected: list[list[int]]) -> None:
    assert in_batches(lengths, most) == expected
