"""Sentences of token ids: none is lost, each ends where people end them, none is longer than allowed."""

from __future__ import annotations

import pytest

from everlong.reading.sentences import SentenceCutter, packed
from tests.reading.conftest import TEXT
from tests.reading.small_tokenizers import KINDS, PAGE, trained
from tests.tiny import byte_tokenizer

BYTES = byte_tokenizer()


def sentences(text, longest=500, tokenizer=BYTES):
    cutter = SentenceCutter(tokenizer, longest)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [tokenizer.decode(each) for each in [*cutter.feed(ids), *cutter.finish()]]


@pytest.mark.parametrize(
    "expected",
    [
        ["It rains. ", "It pours! ", "Does it? ", "Yes… ", "No."],
        ['"Come in," he said. ', '"I will." ', "(So she did.) ", "They sat."],
        ["Der Regen fällt. ", "Über dem Dach ist er laut. ", "¿Quién? ", "¡Ella!"],
        ["Дождь идёт. ", "Он громкий."],
        ["雨が降る。", "「うるさい！」", "静かだ。"],
        ["बारिश होती है। ", "शोर है।"],
        ["هل تمطر؟ ", "نعم۔ ", "لا"],
        ["A heading\n\n", "and a paragraph"],
        ["- eggs\n", "- milk\n", "- 3.5 kg of flour"],
        ["name,age\n", "Ann,30\n", "Bob,41"],
        ["def f(x):\n    ", "return x + 1\n\n\n", "y = 2"],
        ["A line that is wrapped\nin the middle of a sentence. ", "Another."],
        ["Mr. Darcy met Dr. J. Watson, e.g. in St. Ives. ", "He left."],
        ["It costs 3.50 at example.com. ", "Cheap."],
        ["Wait... what? ", "Nothing."],
        ["one thing and no end of it"],
        ["\n\n  \nAfter blanks"],
    ],
)
def test_they_end_where_people_end_them(expected):
    assert sentences("".join(expected)) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("longest", [7, 40])
def test_joined_they_are_what_was_taken_and_none_is_too_long(kind, longest):
    tokenizer = trained(kind)
    ids = tokenizer(PAGE[:1500] + TEXT, add_special_tokens=False)["input_ids"]
    cutter = SentenceCutter(tokenizer, longest)
    whole = [sentence for at in range(0, len(ids), 11) for sentence in cutter.feed(ids[at : at + 11])]
    whole += cutter.finish()
    assert [token for sentence in whole for token in sentence] == ids
    assert all(0 < len(sentence) <= longest for sentence in whole)
    assert len(whole) > 15


def test_pieces_make_no_difference():
    ids = BYTES(TEXT)["input_ids"]
    at_once, by_one = SentenceCutter(BYTES), SentenceCutter(BYTES)
    expected = [*at_once.feed(ids), *at_once.finish()]
    assert [*(each for token in ids for each in by_one.feed([token])), *by_one.finish()] == expected


def test_what_has_no_end_is_cut_between_characters():
    assert sentences("a" * 25, longest=10) == ["a" * 10, "a" * 10, "a" * 5]
    assert sentences("🙂" * 5, longest=6) == ["🙂"] * 5
    assert sentences("中文" * 4, longest=10) == ["中文中", "文中文", "中文"]


def test_a_character_that_is_longer_than_a_sentence_is_cut():
    cutter = SentenceCutter(BYTES, 2)
    ids = BYTES("🙂🙂")["input_ids"]
    assert [*cutter.feed(ids), *cutter.finish()] == [ids[at : at + 2] for at in range(0, 8, 2)]


def test_they_are_packed_in_order_as_many_as_fit():
    lengths = [3, 4, 3, 1, 9, 10, 2]
    given = [[number] * length for number, length in enumerate(lengths)]
    packs = list(packed(given, 10))
    assert [[len(each) for each in pack] for pack in packs] == [[3, 4, 3], [1, 9], [10], [2]]
    assert [each for pack in packs for each in pack] == given
    assert list(packed([], 10)) == []
