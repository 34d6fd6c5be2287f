"""A text read in pieces has the tokens of the whole."""

from __future__ import annotations

import random
from typing import Any

import pytest

from everlong.reading.tokens import TextCoder, TokenStream
from tests.reading.small_tokenizers import KINDS, PAGE, trained
from tests.tiny import byte_tokenizer


def hostile_text(seed: int, length: int) -> str:
    """Text that is hard to cut: long runs, emoji, scripts without blanks, digits, special tokens."""
    draw = random.Random(seed)
    makers = [
        lambda n: " " * n,
        lambda n: "\n" * (n // 2),
        lambda n: "-=_#"[n % 4] * n,
        lambda n: str(draw.randrange(10 ** (n // 2 + 1))),
        lambda n: PAGE[(start := draw.randrange(len(PAGE) - 200)) : start + n],
        lambda n: "".join(chr(draw.randrange(0x4E00, 0x9F00)) for _ in range(n)),
        lambda n: "".join(draw.choice("👩\u200d👧🏽🙂🇩🇪é\u0301ا한") for _ in range(n // 3)),
        lambda n: "".join(
            chr(c) for c in (draw.randrange(1, 0x10FFFF) for _ in range(n // 4)) if c >> 11 != 27
        ),
        lambda n: "said <|end|> and <|start|> aloud"[:n],
        lambda n: "abcdefghijklmnopqrstuvwxyz"[: n % 26 + 1] * 5,
        lambda n: "it's they'll "[: n % 13] * 3 + "a" * n,
    ]
    text = ""
    while len(text) < length:
        text += draw.choice(makers)(draw.randrange(1, 160))
    return text[:length]


def in_pieces(stream: TokenStream, text: str, seed: int, longest_piece: int) -> list[int]:
    draw = random.Random(seed)
    ids: list[int] = []
    place = 0
    while place < len(text):
        step = draw.randrange(1, longest_piece + 1)
        ids += stream.feed(text[place : place + step])
        place += step
        if draw.random() < 50 / len(text) * longest_piece:
            ids += stream.settle()
    return ids + stream.settle()


@pytest.mark.parametrize("longest_piece", [1, 90, 3000])
@pytest.mark.parametrize("kind", [*KINDS, "byte"])
def test_ids_of_uneven_pieces_are_those_of_the_whole(kind: str, longest_piece: int) -> None:
    coder = TextCoder(byte_tokenizer() if kind == "byte" else trained(kind))
    for seed in range(2):
        text = hostile_text(seed, 1500)
        stream = TokenStream(coder)
        ids = in_pieces(stream, text, seed, longest_piece)
        assert stream.held == len(TokenStream(coder, stream.tail, stream.fresh).finish())
        assert ids + stream.finish() == coder.encode(text)


@pytest.mark.parametrize("kind", [*KINDS, "byte"])
def test_of_ordinary_prose_little_is_held_back(kind: str) -> None:
    coder = TextCoder(byte_tokenizer() if kind == "byte" else trained(kind))
    stream = TokenStream(coder)
    ids = stream.feed(PAGE) + stream.settle()
    assert ids
    assert len(stream.tail) <= coder.longest + 64
    assert stream.held <= coder.longest + 64


def test_a_run_that_cannot_be_cut_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits grouped from the right change with each one to come; past a limit they are cut all the same."""
    coder = TextCoder(trained("digits-from-the-right"))
    stream = TokenStream(coder)
    assert stream.feed("1234567" * 400) + stream.settle() == []
    monkeypatch.setattr("everlong.reading.settling._TOO_LONG", 4000)
    assert stream.feed("1234567" * 400) + stream.settle() != []
    assert len(stream.tail) < 1000


def test_special_tokens_spelled_out_in_a_text_are_text() -> None:
    tokenizer = trained("gpt2")
    stream = TokenStream(TextCoder(tokenizer))
    ids = stream.feed("he said <|end|> aloud") + stream.finish()
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "he said <|end|> aloud"


def test_special_tokens_of_a_template_are_tokens() -> None:
    tokenizer = trained("gpt2")
    stream = TokenStream(TextCoder(tokenizer))
    ids = (
        stream.markup("<|start|>user\n")
        + stream.feed("one <|end|>")
        + stream.markup("<|end|>\n")
        + stream.finish()
    )
    whole = tokenizer("<|start|>user\none ", add_special_tokens=False).input_ids
    assert ids[: len(whole)] == whole
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids) == "<|start|>user\none <|end|><|end|>\n"


def test_template_text_merges_with_the_text_after_it_as_in_the_whole() -> None:
    tokenizer = trained("llama3")
    stream = TokenStream(TextCoder(tokenizer))
    ids = stream.markup("<|start|>user\n") + stream.feed("\n\nIt is a truth") + stream.finish()
    assert ids == tokenizer("<|start|>user\n\n\nIt is a truth", add_special_tokens=False).input_ids


@pytest.mark.parametrize("kind", KINDS)
def test_text_after_a_special_token_has_the_tokens_it_has_in_the_whole(kind: str) -> None:
    tokenizer = trained(kind)
    stream = TokenStream(TextCoder(tokenizer))
    ids = stream.special(tokenizer.bos_token_id) + stream.feed(PAGE[:300]) + stream.settle() + stream.finish()
    assert ids == tokenizer("<|start|>" + PAGE[:300], add_special_tokens=False).input_ids


@pytest.mark.parametrize("add_bos", [False, True])
def test_the_start_token_is_found_where_the_tokenizer_adds_one(add_bos: bool) -> None:
    assert TextCoder(byte_tokenizer(add_bos)).bos == ([256] if add_bos else [])


def test_blanks_that_a_special_token_swallows_are_swallowed() -> None:
    from tokenizers import AddedToken

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<turn>", rstrip=True, special=True)]}
    )
    assert TextCoder(tokenizer).split_markup("a<turn>\n  b</s>\n") == ["a", 259, "b", 257, "\n"]


def test_a_fork_goes_its_own_way() -> None:
    stream = TokenStream(TextCoder(byte_tokenizer()))
    first = stream.feed("abc")
    fork = stream.fork()
    assert fork.feed("d") + fork.finish() == list(b"abcd")
    assert first + stream.finish() == list(b"abc")


@pytest.mark.model
@pytest.mark.parametrize("name", ["smollm2-135m"])
def test_ids_of_pieces_are_those_of_the_whole_for_a_real_tokenizer(name: str) -> None:
    from everlong.models.loading import load_model

    tokenizer: Any = load_model(name).tokenizer
    coder = TextCoder(tokenizer)
    for seed in range(6):
        text = hostile_text(seed, 9000)
        stream = TokenStream(coder)
        ids = in_pieces(stream, text, seed, (1, 40, 5000)[seed % 3])
        assert ids + stream.finish() == coder.encode(text)
