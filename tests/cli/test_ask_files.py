"""``everlong ask QUESTION FILE... --method NAME``: one question about files that are read for it."""

from __future__ import annotations

import json
import re

import pytest

from everlong.llm import load
from everlong.reading import Homer, InfiniRetri, ParallelWindows
from tests.cli.conftest import TEXT
from tests.tiny import byte_llama

METHODS = {
    "infini-retri": (InfiniRetri(chunk=200, top=20, longest=100), ("chunk=200", "top=20", "longest=100")),
    "parallel-windows": (ParallelWindows(window=300), ("window=300",)),
    "homer": (Homer(window=600, neighbours=1), ("window=600", "neighbours=1")),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model that reads and writes bytes, trained to 1,024 of them."""
    path = tmp_path_factory.mktemp("models") / "longer"
    model, tokenizer = byte_llama(max_position_embeddings=1024, num_hidden_layers=6)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(params=METHODS)
def asked(request):
    """A method, and the words that ask for it."""
    method, settings = METHODS[request.param]
    options = [word for setting in settings for word in ("--set", setting)]
    return method, ("--method", request.param, *options, "--max-new-tokens", 7)


def test_it_reads_a_file_for_the_question(everlong, novel, folder, asked):
    method, words = asked
    result = everlong("ask", "Who?", novel, *words)
    with load(folder, device="cpu") as llm:
        expected = llm.ask(novel, "Who?", method, max_new_tokens=7)
    assert (result.code, result.out) == (0, f"{expected.text}\n")
    assert f"{expected.stats.tokens_read:,} tokens read" in result.err and "novel.txt" in result.err


def test_several_files_and_standard_input_are_one_text(everlong, novel, folder, asked):
    method, words = asked
    result = everlong("ask", "Who?", novel, "-", *words, "--json", "--quiet", stdin="Then it rained.")
    with load(folder, device="cpu") as llm:
        expected = llm.ask(f"{TEXT}Then it rained.", "Who?", method, max_new_tokens=7)
    told = json.loads(result.out)
    (answer,) = told["answers"]
    assert (answer["question"], answer["answer"], answer["tokens"]) == (
        "Who?",
        expected.text,
        expected.tokens,
    )
    for name in ("tokens_read", "tokens_written", "kept", "forgotten", "bytes"):
        assert told["stats"][name] == getattr(expected.stats, name)
    assert result.err == ""


def test_system_text_and_draws_are_as_asked_for(everlong, novel, folder):
    words = (
        "--method",
        "parallel-windows",
        "--system",
        "Be terse.",
        "--temperature",
        1,
        "--max-new-tokens",
        9,
    )
    first, again, other = (everlong("ask", "Who?", novel, *words, "--seed", seed).out for seed in (3, 3, 4))
    assert first == again != other
    assert everlong("ask", "Who?", novel, *words[:2], *words[6:]).out not in (first, other)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["Who?"], "knows the question before it reads.*ask QUESTION FILE"),
        (["Who?", "missing.txt"], "cannot open missing.txt"),
        (["Who?", "-", "-"], "standard input"),
        (["Who?", "-", "--attention", "full"], "leave out --attention"),
        (["Who?", "-", "--memory", "bees"], "leave out --memory"),
        (["Who?", "-", "--set", "chunks=5"], "unknown option of infini-retri 'chunks'; did you mean 'chunk'"),
        (["Who?", "-", "--set", "chunk=0"], "chunk must be a whole number of at least 1"),
        (["Who?", "-", "--max-new-tokens", "1000"], "trained on 1024 tokens"),
        (["", "-"], "the question is empty"),
        (["Who?", "-"], "is empty: there is nothing to read"),
    ],
)
def test_bad_input_is_one_line(everlong, words, message):
    given = ["--method", "infini-retri", "--set", "longest=100", "--quiet", *words]
    if not any("chunk" in word for word in words):
        given += ["--set", "chunk=300"]
    result = everlong("ask", *given)
    assert result.code == 2 and len(result.err.splitlines()) == 1
    assert re.search(message, result.err), result.err


def test_unknown_methods_and_policies_are_told_apart(everlong, novel):
    near = everlong("ask", "Who?", novel, "--method", "infini-retry")
    assert near.code == 2 and "did you mean 'infini-retri'" in near.err
    policy = everlong("ask", "Who?", novel, "--method", "lm-infinite")
    assert policy.code == 2 and "everlong read FILE... --attention lm-infinite --ask QUESTION" in policy.err
    for command in (("read", novel), ("chat",), ("ask", "Who?"), ("generate", "It")):
        result = everlong(*command, "--attention", "infini-retri")
        assert result.code == 2 and "everlong ask QUESTION FILE... --method infini-retri" in result.err


def test_without_a_method_it_answers_from_what_the_model_knows(everlong):
    result = everlong("ask", "Who?", "Where?", "--json", "-q", "--max-new-tokens", 3, "--set", "window=200")
    answers = json.loads(result.out)["answers"]
    assert [answer["question"] for answer in answers] == ["Who?", "Where?"]
    assert all(answer["seconds"] > 0 and answer["stop_reason"] == "length" for answer in answers)


def test_without_a_method_a_file_is_not_taken_for_a_question(everlong, novel):
    result = everlong("ask", "Who?", novel, "-q")
    assert result.code == 2 and len(result.err.splitlines()) == 1
    assert f"everlong read {novel} --ask QUESTION" in result.err and "--method infini-retri" in result.err
