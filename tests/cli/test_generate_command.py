import json

import pytest

from everlong.attention import LMInfinite
from everlong.llm import load
from everlong.reading import Sampling

OPTIONS = ("--set", "window=40", "--max-new-tokens", 12)


def expected(folder, prompt, *, seed=None, **options):
    with load(folder, LMInfinite(window=40), device="cpu") as llm:
        session = llm.session(seed=seed)
        session.read(prompt)
        return session.generate(12, **options)


def test_it_goes_on_from_its_argument_or_standard_input(everlong, folder):
    written = expected(folder, "Once upon a time").text
    assert everlong("generate", "Once upon a time", *OPTIONS).out == f"{written}\n"
    for words in ([], ["-"]):
        assert everlong("generate", *words, *OPTIONS, stdin="Once upon a time").out == f"{written}\n"


def test_sampling_options_are_those_of_the_library(everlong, folder):
    sampling = Sampling(temperature=1.5, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.3)
    options = ("--temperature", 1.5, "--top-k", 20, "--top-p", 0.9, "--min-p", 0.01, "--seed", 7)
    result = everlong("generate", "Once", *OPTIONS, *options, "--repetition-penalty", 1.3)
    assert result.out == f"{expected(folder, 'Once', seed=7, sampling=sampling).text}\n"


def test_speculation_changes_nothing_but_the_time(everlong, folder):
    written = expected(folder, "abcabcabc").text
    assert everlong("generate", "abcabcabc", *OPTIONS, "--speculate", "prompt-lookup").out == f"{written}\n"
    result = everlong("generate", "abc", *OPTIONS, "--speculate", "lookup")
    assert result.code == 2 and "did you mean 'prompt-lookup'" in result.err


def test_it_stops_at_a_stop_string(everlong, folder):
    whole = expected(folder, "Once").text
    stop = whole[3:5]
    result = json.loads(everlong("generate", "Once", *OPTIONS, "--stop", stop, "--json").out)
    assert result["text"] == whole[: whole.index(stop)] and result["stop_reason"] == "stop"


def test_json_has_the_text_and_the_accounts(everlong, folder):
    result = json.loads(everlong("generate", "Once", *OPTIONS, "--json", "--quiet").out)
    generation = expected(folder, "Once")
    assert (result["text"], result["tokens"]) == (generation.text, generation.tokens)
    assert result["stats"]["tokens_read"] == generation.stats.tokens_read


@pytest.mark.parametrize("words, stdin", [([""], ""), ([], "")])
def test_a_prompt_of_nothing_is_refused(everlong, words, stdin):
    result = everlong("generate", *words, "--quiet", stdin=stdin)
    assert result.code == 2 and "empty" in result.err and not result.out


def test_the_name_of_a_file_is_no_prompt(everlong, tmp_path):
    story = tmp_path / "story.txt"
    story.write_text("Once")
    result = everlong("generate", story)
    assert result.code == 2 and f"everlong generate < {story}" in "".join(result.err.splitlines())
    assert everlong("generate", "x" * 5000, "--max-new-tokens", 1, "--set", "window=40").code == 0


def test_threads_beyond_all_measure_are_refused(everlong):
    result = everlong("generate", "Once", "--threads", 99999)
    assert result.code == 2 and "'--threads'" in result.err and "1024" in result.err
