"""The next token is chosen as asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

from everlong.errors import ConfigurationError, NumericalError
from everlong.reading.sampling import Sampler, Sampling

LOGITS = torch.tensor([0.0, 3.0, 2.0, -1.0, 2.5])


def draws(count: int = 2000, recent: tuple[int, ...] = (), **options: Any) -> list[int]:
    sampler = Sampler(
        Sampling(temperature=options.pop("temperature", 1.0), **options), torch.Generator().manual_seed(0)
    )
    return [sampler(LOGITS, recent) for _ in range(count)]


def test_by_default_the_likeliest_token_is_taken() -> None:
    assert Sampler(Sampling(), torch.Generator())(LOGITS, []) == 1


def test_draws_follow_the_distribution() -> None:
    frequencies = torch.bincount(torch.tensor(draws(20_000)), minlength=5) / 20_000
    torch.testing.assert_close(frequencies, LOGITS.softmax(-1), atol=0.02, rtol=0)


def test_a_draw_takes_one_random_number_whatever_the_vocabulary() -> None:
    states = []
    for words in (5, 5000):
        generator = torch.Generator().manual_seed(3)
        Sampler(Sampling(temperature=1.0), generator)(torch.zeros(words), [])
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_of_a_quarter_of_a_million_words_those_at_the_end_are_drawn_as_often() -> None:
    logits = torch.full((262_144,), -20.0)
    logits[-1000:] = 0.0
    sampler = Sampler(Sampling(temperature=1.0), torch.Generator().manual_seed(1))
    drawn = torch.tensor([sampler(logits, []) for _ in range(2000)])
    assert (drawn >= len(logits) - 1000).float().mean() > 0.99
    halves = (drawn[drawn >= len(logits) - 1000] >= len(logits) - 500).float().mean()
    assert 0.46 < halves < 0.54


def test_temperature_flattens() -> None:
    frequencies = torch.bincount(torch.tensor(draws(20_000, temperature=2.0)), minlength=5) / 20_000
    torch.testing.assert_close(frequencies, (LOGITS / 2).softmax(-1), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("options", "possible"),
    [
        ({"top_k": 2}, {1, 4}),
        ({"top_p": 0.6}, {1, 4}),
        ({"min_p": 0.3}, {1, 2, 4}),
        ({"top_k": 3, "min_p": 0.5}, {1, 4}),
    ],
)
def test_only_likely_tokens_are_drawn(options: dict[str, Any], possible: set[int]) -> None:
    assert set(draws(**options)) == possible


def test_top_p_is_that_of_transformers() -> None:
    kept = TopPLogitsWarper(0.6)(None, LOGITS[None]).isfinite()[0].nonzero().flatten().tolist()
    assert set(draws(top_p=0.6)) == set(kept)


def test_the_penalty_looks_back_over_its_window_only() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2.0, repetition_window=2), torch.Generator())
    assert sampler(LOGITS, [1, 0, 0]) == 1
    assert sampler(LOGITS, [0, 1, 0]) == 4
    assert sampler(LOGITS, [0, 4, 1]) == 2
    expected = RepetitionPenaltyLogitsProcessor(2.0)(torch.tensor([[4, 1]]), LOGITS[None].clone())
    assert int(expected.argmax()) == 2
    assert LOGITS[1] == 3.0, "the caller's logits are left alone"


def test_a_saved_generator_goes_on_drawing_the_same() -> None:
    generator = torch.Generator().manual_seed(3)
    sampler = Sampler(Sampling(temperature=1.0), generator)
    [sampler(LOGITS, []) for _ in range(5)]
    state = generator.get_state()
    first = [sampler(LOGITS, []) for _ in range(20)]
    again = torch.Generator()
    again.set_state(state)
    assert [Sampler(Sampling(temperature=1.0), again)(LOGITS, []) for _ in range(20)] == first


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    logits = LOGITS.clone()
    logits[3] = bad
    with pytest.raises(NumericalError, match="not finite"):
        Sampler(Sampling(temperature=temperature), torch.Generator())(logits, [])


def test_tokens_that_a_model_masks_out_are_no_error() -> None:
    logits = LOGITS.clone()
    logits[0] = -torch.inf
    assert Sampler(Sampling(), torch.Generator())(logits, []) == 1
    with pytest.raises(NumericalError):
        Sampler(Sampling(), torch.Generator())(torch.full((5,), -torch.inf), [])


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": 1.0, "top_p": 0},
        {"temperature": 1.0, "top_p": 1.1},
        {"temperature": 1.0, "min_p": 2},
        {"temperature": 1.0, "top_k": -1},
        {"temperature": 1.0, "top_k": 1.5},
        {"repetition_penalty": 0},
        {"repetition_window": 0},
        {"repetition_window": 5000},
        {"seed": "x"},
        {"top_p": 0.9},
    ],
)
def test_options_that_cannot_work_are_refused_by_name(options: dict[str, Any]) -> None:
    name = [name for name in options if name != "temperature" or len(options) == 1][0]
    with pytest.raises(ConfigurationError, match=name):
        Sampling(**options)
