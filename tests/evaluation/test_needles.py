"""Passkeys: of exactly so many tokens, at their depth, told or not."""

import pytest

from everlong.errors import ConfigurationError, InputError
from everlong.evaluation.needles import Passkey, passkey
from tests.tiny import byte_tokenizer


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("depth", [0, 0.3, 1])
@pytest.mark.parametrize("digits", [7, 64])
def test_a_text_has_its_length_and_the_passkey_stands_at_its_depth(digits, depth, add_bos):
    tokenizer = byte_tokenizer(add_bos)
    needle = passkey(tokenizer, 3000, depth=depth, digits=digits)
    text = tokenizer.decode(needle.context)
    assert len(needle) == 3000 and len(needle.context) + len(needle.question) == 3000
    assert len(needle.answer) == digits and text.count(needle.answer) == 2
    assert tokenizer.decode(needle.question).strip().endswith("The passkey is")
    assert needle.depth == pytest.approx(depth, abs=0.05)
    assert text.index(f"The passkey is {needle.answer}") / len(text) == pytest.approx(depth, abs=0.12)
    assert text.startswith("<s>") == add_bos


def test_other_seeds_and_lengths_have_other_passkeys_and_the_same_seed_the_same():
    tokenizer = byte_tokenizer()
    keys = [passkey(tokenizer, 3000, depth=0.5, seed=seed).answer for seed in range(20)]
    assert len(set(keys)) == 20
    assert passkey(tokenizer, 4000, depth=0, seed=3).answer == keys[3]
    assert passkey(tokenizer, 3000, depth=0.5, digits=9, seed=3).answer[:7] != keys[3]


def test_it_is_asked_for_in_other_words():
    tokenizer = byte_tokenizer()
    usual, other = Passkey(), Passkey(question="What was to be remembered?")
    text = tokenizer.decode(other.sample(tokenizer, 3000, depth=0.5, seed=0).question)
    assert text == f"\n\n{other.asked}" == "\n\nWhat was to be remembered? The passkey is"
    assert other.label == f'{usual.label}, asked "What was to be remembered?"' and other.key != usual.key
    with pytest.raises(ConfigurationError, match="question is empty"):
        passkey(tokenizer, 3000, depth=0.5, question=" ")


@pytest.mark.parametrize("add_bos", [False, True])
def test_it_is_hidden_in_a_text_of_ones_own(add_bos):
    tokenizer = byte_tokenizer(add_bos)
    novel = "It is a truth universally acknowledged. " * 60
    needle = passkey(tokenizer, 2000, depth=0.25, haystack=tokenizer.encode(novel))
    before, after = tokenizer.decode(needle.context).split(
        f"\n\nThe passkey is {needle.answer}. Remember it. {needle.answer} is the passkey. \n\n"
    )
    opening = before.index("It is a truth")
    assert (before + after).count("<s>") == needle.start == add_bos
    assert before[opening:] + after == novel[: len(before) - opening + len(after)]
    assert len(needle) == 2000 and (len(before) - opening) / (
        len(before) - opening + len(after)
    ) == pytest.approx(0.25, abs=0.001)
    with pytest.raises(
        InputError, match="a text of 2,40. tokens is too short to hide a passkey of 7 digits in 4,000"
    ):
        passkey(tokenizer, 4000, depth=0.5, haystack=tokenizer.encode(novel))


def test_the_least_length_is_told_and_enough():
    tokenizer = byte_tokenizer()
    with pytest.raises(ConfigurationError, match="does not fit into 100 tokens: at least") as told:
        passkey(tokenizer, 100, depth=0.5)
    least = int(str(told.value).split("at least ")[1].split()[0])
    assert len(passkey(tokenizer, least, depth=0.5)) == least
    with pytest.raises(ConfigurationError):
        passkey(tokenizer, least - 1, depth=0.5)


@pytest.mark.parametrize(("depth", "digits"), [(-0.1, 7), (1.1, 7), (0.5, 0)])
def test_what_is_no_passkey_is_refused(depth, digits):
    with pytest.raises(ConfigurationError, match="at least one digit and a depth from 0 to 1"):
        passkey(byte_tokenizer(), 3000, depth=depth, digits=digits)


def test_told_is_what_begins_with_the_answer_and_no_other_digit_follows():
    needle = passkey(byte_tokenizer(), 3000, depth=0.5)
    key = needle.answer
    for text, is_told, share in (
        (f" {key}.\nThe", True, 1),
        (f"{key} and 5", True, 1),
        (f" {key}1", False, 1),
        (f" {key[:5]}", False, 5 / 7),
        (f"It is {key}", False, 0),
        ("", False, 0),
    ):
        assert needle.is_told(text) is is_told and needle.told(text) == pytest.approx(share)
