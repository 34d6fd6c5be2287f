"""Passages of a real text, and words left out of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from everlong.errors import ConfigurationError, InputError
from everlong.evaluation.grounded import cloze, passage_loss, passages
from everlong.evaluation.loss import surprisal
from tests import tiny
from tests.reading.small_tokenizers import PAGE, trained

TEXT = " ".join(f"{number} {PAGE}" for number in range(30))


@pytest.mark.parametrize("make", [tiny.byte_tokenizer, lambda: trained("gpt2"), lambda: trained("llama2")])
def test_passages_have_so_many_tokens_and_are_followed_by_as_many(make: Any) -> None:
    tokenizer = make()
    found = passages(TEXT, tokenizer, 100, 5, seed=0)
    assert len(found) == 5
    end = 0
    for passage in found:
        assert passage.start >= end
        assert passage.start == 0 or TEXT[passage.start - 1].isspace()
        end = passage.start + len(passage.text) + len(passage.continuation)
        assert TEXT[passage.start : end] == passage.text + passage.continuation
        assert len(tokenizer(passage.text, add_special_tokens=False)["input_ids"]) == 100


def test_a_seed_gives_the_same_passages_and_a_file_those_of_its_text(tmp_path: Path) -> None:
    tokenizer = tiny.byte_tokenizer()
    found = passages(TEXT, tokenizer, 80, 4, seed=1)
    assert found == passages(TEXT, tokenizer, 80, 4, seed=1) != passages(TEXT, tokenizer, 80, 4, seed=2)
    text = TEXT.replace("\r", "")  # Python reads every end of line as one
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    assert passages(tmp_path / "text.txt", tokenizer, 80, 4, seed=1) == passages(
        text, tokenizer, 80, 4, seed=1
    )


def test_a_text_that_is_too_short_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    tokenizer = tiny.byte_tokenizer()
    assert len(passages(TEXT[:450], tokenizer, 100, 2, seed=0)) == 2
    with pytest.raises(InputError, match="no room for 3 passages of 100 tokens"):
        passages(TEXT[:450], tokenizer, 100, 3, seed=0)
    with pytest.raises(InputError, match="no room"):
        passages("", tokenizer, 1, 1, seed=0)
    with pytest.raises(InputError, match=r"none\.txt"):
        passages(tmp_path / "none.txt", tokenizer, 10, 1, seed=0)
    with pytest.raises(ConfigurationError, match="at least 1"):
        passages(TEXT, tokenizer, 0, 1, seed=0)


def test_cloze_ends_a_sentence_before_a_content_word_of_it() -> None:
    text = (
        "The old harbour master walked slowly to the lighthouse. He was late. Nobody there ever saw him then!"
    )
    found = cloze(text, 10, seed=0)
    assert [probe.form for probe in found] == ["cloze"] * 3
    assert [probe.answers[0] for probe in found] == ["walked", "slowly", "lighthouse"]
    assert found[0].prompt == "The old harbour master"
    assert found[2].prompt == "The old harbour master walked slowly to the"
    assert cloze("He was late.", 3, seed=0) == []


def test_cloze_takes_one_word_a_sentence_first_and_never_one_that_stands_before() -> None:
    flat = " ".join(PAGE.split())
    sentences = [s.strip() for s in re.findall(r"[^.!?]+[.!?]+|[^.!?]+$", flat)]
    found = cloze(PAGE, 4, seed=3)
    assert len(found) == 4 and found == cloze(PAGE, 4, seed=3) != cloze(PAGE, 4, seed=4)
    places = []
    for probe in found:
        (answer,) = probe.answers
        assert len(answer) >= 6 and answer.casefold() not in probe.prompt.casefold().split()
        assert f"{probe.prompt} {answer}" in flat or f"{probe.prompt}{answer}" in flat
        places.append(next(i for i, s in enumerate(sentences) if s.startswith(probe.prompt)))
    assert places == sorted(places)


def test_a_passage_is_scored_alone_and_its_continuation_with_and_without_it() -> None:
    model, tokenizer = tiny.byte_llama(max_position_embeddings=512)
    (passage,) = passages(TEXT, tokenizer, 60, 1, seed=0)
    found = passage_loss(model, tokenizer, passage)
    assert (len(found.passage), len(found.continuation), len(found.continuation_read)) == (59, 59, 60)
    torch.testing.assert_close(
        found.continuation_read,
        surprisal(model, tokenizer, passage.text + passage.continuation)[59:],
    )
    assert (found.continuation - found.continuation_read[1:]).abs().max() > 0.01
