"""Finding texts by their words."""

import math

from everlong.memory.lexical import LexicalIndex, words_of

TEXTS = [
    "The bees are kept by Orla Finch.",
    "The lighthouse keeper has a parrot, and the parrot has a name.",
    "The baker rises at four.",
]


def test_words_know_neither_case_nor_punctuation():
    assert words_of("Who's the KEEPER, of bees?") == ["who", "s", "the", "keeper", "of", "bees"]
    assert words_of("Straße été") == ["strasse", "été"]


def test_characters_of_languages_without_spaces_are_words():
    assert words_of("養蜂人 Orla") == ["養", "蜂", "人", "orla"]


def test_the_text_that_shares_the_rare_words_comes_first():
    index = LexicalIndex(TEXTS)
    assert [index.search(query, 3)[0][0] for query in ("Is the parrot named?", "the bees", "the baker")] == [
        1,
        0,
        2,
    ]
    assert len(index.search("the bees", 3)) == 3


def test_a_score_is_that_of_the_formula():
    # "parrot" twice in a text of 12 words; the texts have 7, 12 and 5.
    length = 1 - 0.75 + 0.75 * 12 / 8
    expected = math.log(1 + 2.5 / 1.5) * 2 * 2.2 / (2 + 1.2 * length)
    ((number, score),) = LexicalIndex(TEXTS).search("Parrot!", 3)
    assert number == 1 and math.isclose(score, expected)
    ((_, twice),) = LexicalIndex(TEXTS).search("parrot parrot", 3)
    assert math.isclose(twice, 2 * expected)


def test_no_more_than_k_and_none_that_shares_no_word():
    index = LexicalIndex(TEXTS)
    assert len(index.search("the", 2)) == 2
    assert index.search("quantum", 3) == [] and index.search("", 3) == []


def test_of_equals_the_earlier_comes_first():
    index = LexicalIndex(["a b", "b a", "a b"])
    assert [number for number, _ in index.search("a", 2)] == [0, 1]


def test_without_texts_nothing_is_found():
    assert len(LexicalIndex([])) == 0 and LexicalIndex([]).search("a", 1) == []
    assert LexicalIndex(["", "..."]).search("a", 1) == []
