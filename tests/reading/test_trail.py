"""The text of tokens that leave is the text that was read, whatever the tokenizer and wherever it is cut."""

import random

import pytest

from everlong.reading.detokenize import Detokenizer
from everlong.reading.tokens import TextCoder
from everlong.reading.trail import Trail
from tests.reading.small_tokenizers import PAGE, trained
from tests.tiny import byte_tokenizer

TEXT = PAGE[:900].replace("\r\n", "\n")
TOKENIZERS = {name: trained(name) for name in ("gpt2", "llama2", "gemma")} | {"bytes": byte_tokenizer()}


def trail_of(ids, *, learns=True, index=0):
    trail = Trail()
    trail.turn(learns, lambda: 0)
    trail.accept(ids, index)
    return trail


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_of_any_size_are_the_text(name):
    tokenizer = TOKENIZERS[name]
    ids = TextCoder(tokenizer).encode(TEXT)
    draws = random.Random(0)
    for most in (1, 3, 50):
        trail, at, pieces = trail_of(ids), 0, []
        while at < len(ids):
            at += draws.randint(1, most)
            pieces.append(trail.leave(at, tokenizer))
        assert "".join(pieces) + trail.leave(None, tokenizer) == TEXT
        assert all("\ufffd" not in piece for piece in pieces)


def test_none_leaves_before_its_index():
    tokenizer = byte_tokenizer()
    trail = trail_of(list(b"abcdef"), index=10)
    assert [trail.leave(index, tokenizer) for index in (10, 12, 12, 15)] == ["", "ab", "", "cde"]
    assert trail.leave(None, tokenizer) == "f" and trail.leave(None, tokenizer) == ""


def test_a_character_of_several_tokens_waits_for_the_last():
    tokenizer, ids = byte_tokenizer(), list("a🙂b".encode())
    trail = trail_of(ids)
    assert [trail.leave(index, tokenizer) for index in range(1, 7)] == ["a", "", "", "", "🙂", "b"]


def test_what_did_not_follow_is_a_blank_line_apart():
    tokenizer, trail = byte_tokenizer(), trail_of(list(b"ab"))
    trail.accept(list(b"cd"), 5)
    assert trail.leave(6, tokenizer) == "ab\n\nc"
    assert trail.leave(None, tokenizer) == "d"


def test_held_text_is_of_the_kind_it_came_as():
    tokenizer, trail = byte_tokenizer(), trail_of([])
    trail.turn(False, lambda: 3)  # three tokens to be learned are held back
    trail.turn(True, lambda: 5)  # and two that are not
    trail.accept(list(b"abcd"), 0)
    trail.accept(list(b"efg"), 4)
    assert trail.leave(None, tokenizer) == "abc\n\nfg"


def test_a_restored_trail_goes_on():
    tokenizer = byte_tokenizer()
    trail = trail_of(list("Ünï. 🙂 Two.".encode()))
    first = trail.leave(8, tokenizer)
    restored = Trail.restored(trail.state())
    assert first + restored.leave(None, tokenizer) == "Ünï. 🙂 Two."
    assert Detokenizer(tokenizer).unfinished == 0
