"""Mappings shown by examples: the same rule in the text and in the probes, on inputs of their own."""

from __future__ import annotations

import re
from string import ascii_lowercase

import pytest

from everlong.errors import ConfigurationError, UnknownNameError
from everlong.evaluation.probes import is_answer
from everlong.evaluation.skills import skill

KINDS = ("labels", "cipher", "format")


def shown(text: str) -> dict[str, str]:
    return dict(re.findall(r"Input: (.+)\nOutput: (.+)\n", text))


@pytest.mark.parametrize("kind", KINDS)
def test_a_skill_has_as_many_examples_and_probes_as_asked_none_in_both(kind) -> None:
    found = skill(0, kind, demonstrations=20, tests=10)
    examples = shown(found.text)
    tried = [re.fullmatch(r"Input: (.+)\nOutput:", probe.prompt).group(1) for probe in found.probes]
    assert (len(examples), len(set(tried))) == (20, 10) and not set(tried) & set(examples)
    assert found == skill(0, kind, demonstrations=20, tests=10) != skill(1, kind, demonstrations=20, tests=10)
    assert {probe.form for probe in found.probes} == {"skill"}


def test_labels_are_four_invented_names_that_all_occur_in_the_examples() -> None:
    found = skill(2, "labels", demonstrations=40, tests=16)
    names = set(shown(found.text).values())
    assert len(names) == 4 and {answer for probe in found.probes for answer in probe.answers} <= names
    assert len(skill(3, "labels", 60, 20).probes) == 20


def test_the_cipher_moves_every_letter_by_one_distance() -> None:
    found = skill(4, "cipher")
    pairs = [*shown(found.text).items(), *((p.prompt.split()[1], p.answers[0]) for p in found.probes)]
    moved = {
        (ascii_lowercase.index(b) - ascii_lowercase.index(a)) % 26
        for word, coded in pairs
        for a, b in zip(word, coded, strict=True)
    }
    assert len(moved) == 1 and 1 <= moved.pop() <= 5


def test_the_format_keeps_the_fields_and_counts_every_mark() -> None:
    found = skill(5, "format")
    for given, written in shown(found.text).items():
        assert sorted(re.findall(r"\w+", given)) == sorted(re.findall(r"\w+", written))
    shapes = {re.sub(r"\w+", "x", written) for written in shown(found.text).values()}
    assert len(shapes) == 1
    probe = found.probes[0]
    assert is_answer(probe.answers[0], probe)
    assert not is_answer(re.sub(r"[|/~#]", ";", probe.answers[0]), probe)


def test_unknown_kinds_and_impossible_sizes_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="cipher"):
        skill(0, "cypher")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="80 inputs"):
        skill(0, "labels", demonstrations=70, tests=20)
    with pytest.raises(ConfigurationError, match="at least one"):
        skill(0, "labels", tests=0)
