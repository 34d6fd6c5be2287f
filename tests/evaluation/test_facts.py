"""Invented facts: told once, asked in three forms, answered nowhere else."""

from __future__ import annotations

import functools
import random
import re
import sysconfig
from pathlib import Path

import pytest

from everlong.errors import ConfigurationError
from everlong.evaluation.facts import (
    EXAMPLES_ELSEWHERE,
    fact_document,
    fact_documents,
    matching_examples,
)
from everlong.evaluation.invented import invented_names
from everlong.evaluation.probes import words
from everlong.evaluation.relations import RELATIONS


@functools.cache
def words_of_the_standard_library() -> frozenset[str]:
    folder = Path(sysconfig.get_path("stdlib"))
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in folder.glob("*.py"))
    return frozenset(word for text in texts for word in re.findall(r"[a-z]+", text.casefold()))


@pytest.mark.parametrize("kind", ["person", "town", "label"])
def test_no_invented_name_is_a_word_of_pythons_own_sources(kind) -> None:
    names = [
        name for part in (True, False) for name in invented_names(random.Random(0), kind, for_examples=part)
    ]
    assert len(set(names)) == len(names) > 2000
    known = words_of_the_standard_library()
    assert "argument" in known and not {name.casefold() for name in names} & known


def test_names_that_follow_each_other_begin_differently() -> None:
    names = list(invented_names(random.Random(0), "person"))
    for begin in range(0, len(names) - 15, 15):
        beginnings = {
            re.match("[BDFGHKLMNPRSTVZ]r?(?=[aeiouy])", name).group() for name in names[begin : begin + 15]
        }
        assert len(beginnings) == 15


def test_values_are_whole_words_and_none_stands_twice() -> None:
    for relation in RELATIONS:
        assert len(set(relation.values)) == len(relation.values)
        assert all(len(value) > 2 for value in relation.values)
        assert not relation.values or len(relation.values) >= 12


def test_a_document_has_thirty_facts_each_told_once_in_about_240_tokens() -> None:
    for seed in range(5):
        document = fact_document(seed)
        assert len(document.facts) == 30
        assert 120 < len(document.text.split()) < 220
        for fact in document.facts:
            (sentence,) = [s for s in document.sentences if s.startswith(f"{fact.before} {fact.value}")]
            assert fact.before.startswith(f"{fact.person} ")
            assert sentence in document.text
    assert len(fact_document(0, people=40, facts_each=5).facts) == 200


def test_a_seed_gives_one_document_and_another_seed_another() -> None:
    assert fact_document(3) == fact_document(3)
    assert not set(fact_document(3).sentences) & set(fact_document(4).sentences)
    assert matching_examples(3) == matching_examples(3) != matching_examples(4)


def test_documents_of_one_set_share_no_person_and_ask_in_reverse_only_what_one_person_answers() -> None:
    documents = fact_documents(0, 6)
    people = [{fact.person for fact in document.facts} for document in documents]
    assert len(set.union(*people)) == sum(map(len, people)) == 60
    values = [(fact.relation, fact.value) for document in documents for fact in document.facts]
    asked = [probe for document in documents for probe in document.probes() if probe.form == "reverse"]
    assert len(asked) == sum(values.count(value) == 1 for value in values)
    assert 0 < len(asked) < len(values)
    alone = [probe for probe in fact_document(0).probes() if probe.form == "reverse"]
    assert len(alone) == 30


def test_probes_ask_for_what_the_document_tells_and_do_not_tell_it() -> None:
    document = fact_document(1)
    probes = document.probes()
    for form in ("completion", "question", "reverse"):
        of_form = [probe for probe in probes if probe.form == form]
        assert len(of_form) == 30
        for probe, fact in zip(of_form, document.facts, strict=True):
            answer, known = (fact.person, fact.value) if form == "reverse" else (fact.value, fact.person)
            assert probe.answers[0] == answer
            assert known in probe.prompt and answer not in probe.prompt
            assert probe.prompt == probe.prompt.rstrip()
            assert probe.prompt in document.text if form == "completion" else "Question:" in probe.prompt


def test_a_date_may_be_written_either_way() -> None:
    probes = fact_document(0).probes()
    (dates, *_) = [probe.answers for probe in probes if "birthday?" in probe.prompt]
    day, month = dates[0].split()
    assert day.isdigit() and dates == (f"{day} {month}", f"{month} {day}")


def test_questions_are_worded_differently_from_what_was_said() -> None:
    grammar = {"a", "as", "the", "is", "on", "in", "s", "was"}
    for relation in RELATIONS:
        said = {word for way in relation.said for word in words(way.replace("{}", ""))}
        for question in (relation.asked, relation.reversed):
            assert not (said & set(words(question.replace("{}", "")))) - grammar, relation


def test_examples_tell_no_answer_and_ask_in_the_same_forms() -> None:
    documents = fact_documents(0, 20)
    told = {answer for document in documents for probe in document.probes() for answer in probe.answers}
    for seed in range(20):
        shown = re.findall(r"Answer: (.+)\n", matching_examples(seed))
        assert len(shown) == 12 and not told & set(shown)
    questions = re.findall(r"Question: (.+)\nAnswer: (\S.*)\n", matching_examples(0))
    assert len(questions) == 12
    patterns = [
        re.escape(way).replace(r"\{\}", ".+") for each in RELATIONS for way in (each.asked, each.reversed)
    ]
    assert all(any(re.fullmatch(pattern, q) for pattern in patterns) for q, _ in questions)
    text = matching_examples(0).split("\n")[0]
    assert all(answer in text for _, answer in questions)


def test_examples_from_elsewhere_do_not_resemble_the_documents() -> None:
    patterns = [
        re.escape(way).replace(r"\{\}", ".+") for each in RELATIONS for way in (each.asked, each.reversed)
    ]
    questions = re.findall(r"Question: (.+)\nAnswer: (.+)", EXAMPLES_ELSEWHERE)
    assert len(questions) == 4 and all(answer in EXAMPLES_ELSEWHERE.split("\n")[0] for _, answer in questions)
    assert not any(re.fullmatch(pattern, q) for pattern in patterns for q, _ in questions)
    values = {value for each in RELATIONS for value in each.values}
    assert not values & set(words(EXAMPLES_ELSEWHERE))


@pytest.mark.parametrize("size", [{"people": 0}, {"facts_each": 0}, {"facts_each": 9}, {"people": 5000}])
def test_sizes_that_cannot_be_are_refused(size) -> None:
    with pytest.raises(ConfigurationError, match="cannot be made|no more people"):
        fact_document(0, **{"facts_each": 1, **size})
