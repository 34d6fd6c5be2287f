"""What learning costs: differences before and after, the wrong-document control, the triangle of segments."""

from __future__ import annotations

import pytest
import torch

from everlong.errors import ConfigurationError, InputError
from everlong.evaluation.forgetting import Retention, Standing, standing, wrong_documents
from everlong.evaluation.probes import Probe
from everlong.evaluation.recall import Answered, Recall
from tests import tiny

PROBES = [Probe("Call me", ("Ishmael",), "cloze"), Probe("Some years", ("before",), "cloze")]


def test_a_damaged_model_has_a_higher_loss_on_an_unrelated_text() -> None:
    text = "abcdefgh" * 60
    model, tokenizer = tiny.byte_llama(max_position_embeddings=1024)
    before = standing(model, tokenizer, text, PROBES)
    again = standing(model, tokenizer, text, PROBES)
    assert again.loss_above(before).mean == 0 and again.accuracy_above(before).mean == 0
    assert before.loss.mean == pytest.approx(float(before.surprisal.mean()))
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    after = standing(model, tokenizer, text, PROBES).loss_above(before)
    assert after.mean > 0 and after.low <= after.mean <= after.high


def test_a_task_that_is_no_longer_answered_is_a_negative_difference_and_texts_must_be_the_same() -> None:
    zeros = torch.zeros(64)
    able = Standing(zeros, Recall(tuple(Answered(probe, probe.answers[0]) for probe in PROBES)))
    unable = Standing(zeros + 0.5, Recall(tuple(Answered(probe, "whale") for probe in PROBES)))
    assert unable.accuracy_above(able).mean == -1 and unable.loss_above(able).mean == pytest.approx(0.5)
    with pytest.raises(InputError, match="3 and 64 tokens"):
        Standing(torch.zeros(3), able.recall).loss_above(able)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_every_document_gets_another_one_and_each_is_used_once(count: int) -> None:
    for seed in range(20):
        others = wrong_documents(count, seed)
        assert sorted(others) == list(range(count))
        assert all(other != own for own, other in enumerate(others))
    with pytest.raises(ConfigurationError, match="at least two"):
        wrong_documents(1, 0)


def test_the_triangle_tells_what_was_learned_what_is_left_and_what_was_lost() -> None:
    found = Retention(((0.8,),)).with_turn([0.9, 0.7]).with_turn([0.3, 0.5, 0.6])
    assert found.learned == pytest.approx((0.8 + 0.7 + 0.6) / 3)
    assert found.final == pytest.approx((0.3 + 0.5 + 0.6) / 3)
    assert found.forgotten == pytest.approx(((0.9 - 0.3) + (0.7 - 0.5)) / 2)
    assert Retention(((0.8,),)).forgotten == 0
    assert found.table().splitlines() == [
        "| after turn | segment 1 | segment 2 | segment 3 | mean |",
        "| ---: | ---: | ---: | ---: | ---: |",
        "| 1 | 80 |  |  | 80 |",
        "| 2 | 90 | 70 |  | 80 |",
        "| 3 | 30 | 50 | 60 | 47 |",
    ]


def test_rows_that_make_no_triangle_are_refused() -> None:
    with pytest.raises(InputError, match="after turn 1 there are 2 segments, not 1"):
        Retention(((0.5,), (0.5,)))
    with pytest.raises(InputError, match="not 2"):
        Retention(((0.5, 0.5),))
