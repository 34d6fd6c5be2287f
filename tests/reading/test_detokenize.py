"""Text comes out whole: characters, emoji, and never a part of a stop string."""

from __future__ import annotations

from typing import Any

import pytest

from everlong.errors import ConfigurationError
from everlong.reading.detokenize import Detokenizer, checked_stop
from tests.reading.small_tokenizers import KINDS, PAGE, trained
from tests.reading.test_tokens import hostile_text
from tests.tiny import byte_tokenizer


def pieces(ids: list[int], tokenizer: Any, **options: Any) -> list[str]:
    detokenizer = Detokenizer(tokenizer, **options)
    out = [detokenizer.put(token) for token in ids]
    return [*out, detokenizer.finish()]


def tokenizer_of(kind: str) -> Any:
    return byte_tokenizer() if kind == "byte" else trained(kind)


@pytest.mark.parametrize("kind", [*KINDS, "byte"])
def test_pieces_join_to_the_text_decoded_at_once(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    for text in (PAGE[:800], hostile_text(1, 600), hostile_text(2, 600)):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert "".join(pieces(ids, tokenizer)) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["byte", "gpt2", "gemma"])
def test_no_piece_has_half_a_character(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    text = "Zürich 東京 🙂 👩\u200d👧\u200d👦 🇩🇪🇫🇷 👋🏽 हिन्दी e"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    out = [piece for piece in pieces(ids, tokenizer) if piece]
    assert "".join(out) == text
    whole = ["👩\u200d👧\u200d👦", "🇩🇪", "🇫🇷", "👋🏽", "हि", "न्"]
    for character in whole:
        assert any(character in piece for piece in out), character


def test_each_letter_is_given_at_once_where_nothing_can_follow() -> None:
    assert pieces(list(b"abc"), byte_tokenizer()) == ["a", "b", "c", ""]


def test_a_blank_before_the_first_word_is_kept_where_there_is_text_before() -> None:
    tokenizer = trained("llama2")
    ids = tokenizer("my dear Mr. Bennet", add_special_tokens=False).input_ids
    for cut in range(1, len(ids)):
        before = tokenizer.decode(ids[:cut])
        assert before + "".join(pieces(ids[cut:], tokenizer, context=ids[:cut])) == "my dear Mr. Bennet"


def test_special_tokens_are_no_text() -> None:
    assert "".join(pieces([97, 257, 98], byte_tokenizer())) == "ab"


def test_bytes_that_are_no_character_do_not_stop_the_flow() -> None:
    out = pieces([255] * 40 + list(b"abc"), byte_tokenizer())
    assert "".join(out[:41]).count("\ufffd") >= 32
    assert "".join(out).endswith("abc")


@pytest.mark.parametrize("stop", [["END"], ["xEND", "D!"], ["ENDE", "EN"], ["\n\n", "END!"]])
def test_a_stop_string_is_met_wherever_tokens_end_and_none_of_it_is_given(stop: list[str]) -> None:
    text = "one ENxEND! two"
    expected = min((text.split(s, 1)[0] for s in stop), key=len)
    detokenizer = Detokenizer(byte_tokenizer(), stop=stop)
    out = ""
    for byte in text.encode():
        out += detokenizer.put(byte)
        assert expected.startswith(out)
        if detokenizer.stopped:
            break
    assert detokenizer.stopped and out + detokenizer.finish() == expected


def test_what_only_began_like_a_stop_string_is_given_in_the_end() -> None:
    assert "".join(pieces(list(b"the EN"), byte_tokenizer(), stop=["END"])) == "the EN"


@pytest.mark.parametrize("stop", ["", ["a", ""], [1]])
def test_a_stop_string_that_cannot_be_met_is_refused(stop: Any) -> None:
    with pytest.raises(ConfigurationError, match="stop string"):
        checked_stop(stop)


def test_one_stop_string_may_be_given_alone() -> None:
    assert checked_stop("END") == ("END",)
