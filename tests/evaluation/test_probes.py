"""What counts as an answer."""

from __future__ import annotations

import pytest

from everlong.errors import InputError
from everlong.evaluation.probes import Probe, is_answer, mentions, words


@pytest.mark.parametrize(
    "written, strict, lenient",
    [
        ("goat", True, True),
        (" A Goat.", True, True),
        ("“the goat” and more", True, True),
        ("goats", False, False),
        ("He keeps a goat", False, True),
        ("a grey goat", False, True),
        ("", False, False),
        ("a", False, False),
    ],
)
def test_the_first_words_must_be_the_answer_and_case_articles_and_marks_do_not_count(
    written: str, strict: bool, lenient: bool
) -> None:
    probe = Probe("Velda keeps a", ("goat", "billy goat"), "completion")
    assert (is_answer(written, probe), mentions(written, probe)) == (strict, lenient)


def test_longer_answers_must_be_complete() -> None:
    probe = Probe("on", ("4 March", "March 4"), "completion")
    assert is_answer("4 march, she says", probe) and is_answer("March 4", probe)
    assert not is_answer("4", probe) and not is_answer("4 May", probe) and not is_answer("14 March", probe)
    assert mentions("it was 4 March", probe) and not mentions("4 of March", probe)
    assert is_answer("Zoë", Probe("x", ("Zoe",), "question"))


def test_marks_count_where_they_are_the_answer() -> None:
    probe = Probe("Output:", ("[a] b | c",), "skill", is_exact=True)
    assert is_answer(" [a] b | c\n", probe) and not is_answer("[a] b / c", probe)
    assert not is_answer("[A] b | c", probe) and mentions("so: [a] b | c", probe)


def test_an_article_alone_is_a_word_and_no_words_are_no_answer() -> None:
    assert words("The") == ["the"] and words("an  Owl!") == ["owl"]
    with pytest.raises(InputError, match="no answer"):
        Probe("x", ("...",), "question")
