"""Tasks: texts that fill a length as far as they can, what stands in them, and how answers are scored."""

from __future__ import annotations

import builtins
import dataclasses
import os
import random
import re
from collections import Counter
from typing import Any

import pytest

from everlong.errors import ConfigurationError, InputError, UnknownNameError
from everlong.evaluation import words
from everlong.evaluation.needles import Passkey, SentenceInText
from everlong.evaluation.ruler_needles import NeedleAmongIds, NeedleAmongNeedles, OneNeedle
from everlong.evaluation.tasks import TASKS, Sample, Task, largest, make_task
from everlong.evaluation.variable_tracking import VariableTracking
from everlong.evaluation.word_counts import CommonWords, FrequentWords, _zeta
from everlong.evaluation.words import Drawn
from tests.evaluation.made_words import made_words  # noqa: F401
from tests.reading.small_tokenizers import trained
from tests.tiny import byte_tokenizer

pytestmark = pytest.mark.usefixtures("made_words")

RULER: dict[str, Task] = {
    "niah_single_1": OneNeedle(),
    "niah_multikey_2": NeedleAmongNeedles(),
    "niah_multikey_3": NeedleAmongIds(),
    "vt": VariableTracking(),
    "cwe": CommonWords(words=4, repeats=6, others=2),
    "fwe": FrequentWords(),
}
ITEM = {
    "niah_single_1": 48,
    "niah_multikey_2": 60,
    "niah_multikey_3": 100,
    "vt": 48,
    "cwe": 24,
    "fwe": 24,
}
"""Bytes of the longest item: what one more of them needs."""


def parts(sample: Sample, tokenizer: Any) -> tuple[str, str]:
    return tokenizer.decode(sample.context), tokenizer.decode(sample.question)


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("name", RULER)
def test_a_text_has_as_many_items_as_fit(name: str, add_bos: bool) -> None:
    tokenizer = byte_tokenizer(add_bos)
    for length in (3000, 3001, 5000):
        sample = RULER[name].sample(tokenizer, length, depth=0.5, seed=1)
        assert length - ITEM[name] < len(sample) <= length
        text, question = parts(sample, tokenizer)
        assert text.startswith("<s>") == bool(sample.start) == add_bos and "<s>" not in text[3:] + question


@pytest.mark.parametrize("kind", ["gpt2", "llama2"])
@pytest.mark.parametrize("name", RULER)
def test_texts_fit_whatever_the_tokenizer(name: str, kind: str) -> None:
    sample = RULER[name].sample(trained(kind), 2500, depth=0.2, seed=0)
    assert 2300 < len(sample) <= 2500


@pytest.mark.parametrize("name", RULER)
def test_texts_are_those_of_their_seed(name: str) -> None:
    def made(seed: int) -> tuple[list[int], list[int], tuple[str, ...]]:
        sample = RULER[name].sample(byte_tokenizer(), 3000, depth=0.5, seed=seed)
        return sample.context.tolist(), sample.question.tolist(), sample.expected

    assert made(1) == made(1)
    assert made(1)[0] != made(2)[0] and made(1)[2] != made(2)[2]


@pytest.mark.parametrize("name", RULER)
def test_a_length_below_the_smallest_text_is_refused_with_one_that_is_enough(name: str) -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ConfigurationError, match=r"does not fit into 90 tokens: at least [\d,]+ are") as told:
        RULER[name].sample(tokenizer, 90, depth=0.5, seed=0)
    least = int(str(told.value).split("at least ")[1].split()[0].replace(",", ""))
    assert len(RULER[name].sample(tokenizer, least, depth=0.5, seed=0)) == least
    with pytest.raises(ConfigurationError, match="at least"):
        RULER[name].sample(tokenizer, least - 1, depth=0.5, seed=0)


@pytest.mark.parametrize("depth", [0, 0.25, 1])
@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_2", "niah_multikey_3"])
def test_the_needle_stands_once_at_its_depth_and_the_question_is_for_it(name: str, depth: float) -> None:
    tokenizer = byte_tokenizer()
    sample = RULER[name].sample(tokenizer, 6000, depth=depth, seed=3)
    text, question = parts(sample, tokenizer)
    kind = "code" if name == "niah_multikey_3" else "number"
    needles = re.findall(rf"The secret {kind} of (\S+) is (\S+)\.", text)
    (asked,) = re.findall(rf"The secret {kind} of (\S+) is$", question)
    assert [value for key, value in needles if key == asked] == list(sample.expected)
    assert (len(needles) == 1) == (name == "niah_single_1")
    assert len({key for key, _ in needles}) == len({value for _, value in needles}) == len(needles)
    assert text.index(asked) / len(text) == pytest.approx(depth, abs=0.04)
    assert sample.depth == depth


def test_every_name_of_the_chain_that_is_asked_for_holds_its_value() -> None:
    tokenizer = byte_tokenizer()
    for task in (VariableTracking(), VariableTracking(chains=3, hops=2)):
        sample = task.sample(tokenizer, 4000, depth=0.5, seed=2)
        text, question = parts(sample, tokenizer)
        example, held = text.split("namely")[0], dict[str, str]()
        for name, value in re.findall(r"LET (\w+) = (\w+)\.", text):
            assert value.isdigit() or value in held, "a name is set before it is used"
            held[name] = held.get(value, value)
        (asked,) = set(re.findall(r"hold (\d+)", question))
        assert tuple(name for name, value in held.items() if value == asked) == sample.expected
        assert len(sample.expected) == task.hops + 1 and len(held) == 2 * task.chains * (task.hops + 1)
        assert asked not in example and sample.depth is None


def test_the_common_words_are_more_common_than_all_others() -> None:
    tokenizer, task = byte_tokenizer(), CommonWords(words=4, repeats=6, others=2)
    sample = task.sample(tokenizer, 4000, depth=0.5, seed=2)
    example, listed = parts(sample, tokenizer)[0].rsplit("\n\n", 1)
    lines = [line.split(". ") for line in listed.splitlines()]
    assert [int(number) for number, _ in lines] == list(range(1, len(lines) + 1))
    counts = Counter(word for _, word in lines)
    assert {word for word, _ in counts.most_common(4)} == set(sample.expected)
    assert Counter(counts.values()) == {6: 4, 2: len(counts) - 4}
    assert not [word for word in counts if word in example]


def test_a_list_that_runs_out_of_words_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="runs out of words at .* use a smaller length"):
        CommonWords(words=4, repeats=6, others=2).sample(byte_tokenizer(), 40_000, depth=0.5, seed=2)


@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_the_three_most_frequent_words_come_after_the_dots_and_before_all_others(alpha: float) -> None:
    tokenizer = byte_tokenizer()
    for length in (3000, 9000):
        sample = FrequentWords(alpha).sample(tokenizer, length, depth=0.5, seed=4)
        coded = parts(sample, tokenizer)[0].split("\n\n")[1].split()
        dots, *counts = Counter(coded).most_common(5)
        assert dots[0] == "......" and {word for word, _ in counts[:3]} == set(sample.expected)
        assert counts[2][1] > counts[3][1]
        expected = [dots[1] * rank**-alpha for rank in range(2, 5)]  # rare words are left out
        assert [count for _, count in counts[:3]] == pytest.approx(expected, abs=1)
        assert dots[1] / len(coded) == pytest.approx(1 / _zeta(alpha), rel=0.2)


def test_zeta_is_riemanns() -> None:
    assert _zeta(2.0) == pytest.approx(1.6449340668482264, rel=1e-9)
    assert _zeta(1.5) == pytest.approx(2.612375348685488, rel=1e-6)


def test_a_sentence_of_ones_own_stands_in_a_text_of_ones_own(tmp_path: Any) -> None:
    tokenizer, novel = byte_tokenizer(), tmp_path / "novel.txt"
    novel.write_text("It is a truth universally acknowledged. " * 100)
    task = SentenceInText(str(novel), "Ann has a key.", "What has Ann?", "A key")
    sample = task.sample(tokenizer, 2000, depth=0.25, seed=0)
    text, question = parts(sample, tokenizer)
    assert len(sample) == 2000 and text.index("Ann has a key.") / len(text) == pytest.approx(0.25, abs=0.06)
    assert question == "\n\nQuestion: What has Ann?\nAnswer:"
    led = dataclasses.replace(task, lead="Ann has").sample(tokenizer, 2000, depth=0.25, seed=0)
    assert parts(led, tokenizer)[1] == "\n\nQuestion: What has Ann?\nAnswer: Ann has" and len(led) == 2000
    assert sample.told(" She has a KEY.") == 1 and sample.told(" She has akey") == 0
    assert sample.tokens_to_write(tokenizer) >= len("Ann has a key.") + len("A key")
    with pytest.raises(InputError, match="too short to hide this sentence"):
        task.sample(tokenizer, 6000, depth=0.5, seed=0)
    with pytest.raises(InputError, match=r"missing\.txt"):
        SentenceInText(str(tmp_path / "missing.txt")).sample(tokenizer, 900, depth=0.5, seed=0)


def test_a_sentence_is_hidden_in_pythons_own_sources_unless_told_otherwise() -> None:
    tokenizer = byte_tokenizer()
    sample = SentenceInText().sample(tokenizer, 600_000, depth=0.5, seed=0)  # more than four files have
    assert parts(sample, tokenizer)[1].endswith("hides her spare key under the")
    assert len(sample) == 600_000 and "Command-line parsing" in parts(sample, tokenizer)[0]


def test_told_is_the_share_of_what_is_expected_that_an_answer_contains() -> None:
    sample = FrequentWords().sample(byte_tokenizer(), 2000, depth=0, seed=0)
    first, second, third = sample.expected
    assert sample.told(f"{first.upper()}, then {second}x") == pytest.approx(2 / 3)
    assert not sample.is_told(f"{first} {second}") and sample.is_told(f"{third} {second}{first}")
    assert sample.told("") == 0


@pytest.mark.parametrize("name", RULER)
def test_an_answer_has_room_for_what_is_expected(name: str) -> None:
    tokenizer = trained("gpt2")
    sample = RULER[name].sample(tokenizer, 2500, depth=0.2, seed=0)
    told = "\n".join(f"{at}. {word}" for at, word in enumerate(sample.expected, 1))
    assert sample.tokens_to_write(tokenizer) >= len(tokenizer.encode(told))


# --- their names --------------------------------------------------------------------------------------


def test_tasks_are_known_by_name_and_take_options_behind_colons() -> None:
    assert set(TASKS) == {"passkey", "niah", *RULER}
    assert make_task("vt") == VariableTracking()
    assert make_task(" cwe:repeats=20 : words=5") == CommonWords(words=5, repeats=20)
    assert make_task("passkey:digits=64:text=library") == Passkey("library", 64)
    assert make_task("fwe:alpha=1.5").label == "fwe, alpha=1.5"
    assert make_task("passkey:digits=64").label == "passkey of 64 digits" and make_task("vt").label == "vt"


@pytest.mark.parametrize(
    ("written", "error", "said"),
    [
        ("vtt", UnknownNameError, "did you mean 'vt'"),
        ("cwe:repeat=3", UnknownNameError, "did you mean 'repeats'"),
        ("cwe:repeats", ConfigurationError, "cwe:KEY=VALUE"),
        ("cwe:repeats=many", ConfigurationError, "repeats is a number, not 'many'"),
        ("cwe:repeats=3", ConfigurationError, "repeats must be at least 4, not 3"),
        ("vt:hops=0", ConfigurationError, "vt: hops must be at least 1, not 0"),
        ("fwe:alpha=1", ConfigurationError, "alpha must be from 1.1 to 5"),
        ("fwe:alpha=14", ConfigurationError, "alpha must be from 1.1 to 5"),
        ("fwe:alpha=nan", ConfigurationError, "alpha must be from 1.1 to 5"),
        ("passkey:digits=0", ConfigurationError, "digits must be at least 1"),
        ("niah:needle=", ConfigurationError, "needle is empty"),
    ],
)
def test_what_is_no_task_is_refused(written: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        make_task(written)


def test_a_key_tells_texts_apart_that_have_one_label(tmp_path: Any) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, second = tmp_path / "a" / "text", tmp_path / "b" / "text"
    first.write_text("one"), second.write_text("two")
    tasks = [Passkey(), Passkey("library"), Passkey(str(first)), Passkey(str(second))]
    assert len({task.label for task in tasks[:2]}) == 1 and len({task.key for task in tasks}) == 4
    assert {task.label for task in tasks[2:]} == {"passkey of 7 digits (text)"}
    assert Passkey(str(first)).key == tasks[2].key
    second.write_text("three")
    assert Passkey(str(second)).key != tasks[3].key


def test_a_text_that_can_be_read_once_only_is_refused(tmp_path: Any) -> None:
    os.mkfifo(tmp_path / "pipe")
    for text in (str(tmp_path / "pipe"), ""):
        with pytest.raises(ConfigurationError, match="name a file"):
            Passkey(text).sample(byte_tokenizer(), 900, depth=0.5, seed=0)
        with pytest.raises(ConfigurationError, match="name a file"):
            Passkey(text).key  # noqa: B018


def test_another_python_has_other_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Passkey("library").key
    monkeypatch.setattr("platform.python_version", lambda: "4.0")
    assert Passkey("library").key != before


def test_a_sentence_is_answered_in_whole_words() -> None:
    task = SentenceInText(needle="Ann has the key.", question="Who has the key?", answer="Ann")
    sample = task.sample(byte_tokenizer(), 900, depth=0.5, seed=0)
    assert sample.is_told("It is Ann.") and sample.is_told("ann")
    assert not sample.is_told("I cannot tell, in a manner of speaking.")


# --- what they are made of ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_the_largest_count_that_fits_is_found_in_few_steps(seed: int) -> None:
    draws = random.Random(seed)
    sizes = [draws.randrange(50)]
    for _ in range(20_000):
        sizes.append(sizes[-1] + draws.choice((1, 2, 3, 40)))
    asked: list[int] = []

    def size(count: int) -> int:
        asked.append(count)
        return sizes[count]

    room = draws.randrange(sizes[3], sizes[9000])
    found = largest(size, room, 3)
    assert sizes[found] <= room < sizes[found + 1] and len(asked) < 40
    assert largest(size, sizes[-1], 3, 500) == 500


def test_drawn_values_are_new_and_a_longer_list_begins_as_a_shorter_one() -> None:
    def digit(draws: random.Random) -> str:
        return draws.choice("0123456789")

    drawn = Drawn("a", digit)
    assert sorted(drawn.first(10)) == list("0123456789") and drawn.first(4) == drawn.first(10)[:4]
    assert Drawn("a", digit).first(10) == drawn.first(10) != Drawn("b", digit).first(10)
    with pytest.raises(ConfigurationError, match="only 10 different words of 11"):
        drawn.first(11)


def test_english_words_come_from_a_package_and_where_it_is_missing_that_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    words.word_list.cache_clear()
    load = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "wonderwords":
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigurationError, match=r"pip install 'everlong\[bench\]'"):
        OneNeedle().sample(byte_tokenizer(), 900, depth=0, seed=0)


def test_english_words_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wonderwords")
    monkeypatch.undo()
    nouns = words.word_list("noun")
    assert len(nouns) > 5000 and list(nouns) == sorted(set(nouns))
    assert all(re.fullmatch("[a-z]+", word) for word in nouns)
    assert words.known_words() > len(nouns)
