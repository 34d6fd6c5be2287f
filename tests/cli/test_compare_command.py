import json
import math

import pytest

from everlong.attention import FullAttention, LMInfinite, Recall
from everlong.cli.reading_bars import ReadingBars
from everlong.llm import load
from tests.cli.conftest import TEXT

OPTIONS = ("--set", "window=40", "--bucket", 100, "--tokens", 400)
PNG = b"\x89PNG\r\n"


def test_stock_and_the_default_method_side_by_side(everlong, novel, folder):
    result = everlong("compare", novel, *OPTIONS, "--json")
    comparison = json.loads(result.out)
    assert result.code == 0 and "--tokens reads more" in result.err
    assert [method["name"] for method in comparison["results"]] == ["stock", "recall"]
    stock, ours = comparison["results"]
    assert ours["options"]["window"] == 40 and (ours["kept"], ours["forgotten"]) == (400, 0)
    assert (stock["kept"], stock["forgotten"]) == (400, 0)
    with load(folder, Recall(window=40), device="cpu") as llm:
        session = llm.session()
        score = session.score(TEXT[:400])
    nll = sum(b["tokens"] * math.log(b["perplexity"]) for b in ours["buckets"])
    assert sum(b["tokens"] for b in ours["buckets"]) == score.tokens
    assert nll == pytest.approx(score.nll * score.tokens, rel=1e-4)


def test_a_system_text_is_pinned_before_the_text_and_read_raw(everlong, novel, folder):
    methods = ("--methods", "stock,lm-infinite")
    result = everlong("compare", novel, *OPTIONS, *methods, "--system", "Be terse.", "--json")
    comparison = json.loads(result.out)
    pinned = list(b"Be terse.\n\n")
    assert (comparison["pinned"], comparison["tokens"]) == (len(pinned), 400)
    stock, ours = comparison["results"]
    assert ours["options"]["sinks"] == len(pinned) and (ours["seen"], ours["kept"]) == (411, 40)
    for shown, policy in ((stock, FullAttention()), (ours, LMInfinite(window=40, sinks=len(pinned)))):
        assert [b["start"] for b in shown["buckets"]] == [0, 100, 200, 300]
        assert [b["tokens"] for b in shown["buckets"]] == [100] * 4
        with load(folder, policy, device="cpu") as llm:
            session = llm.session()
            session.read(pinned)
            score = session.score(TEXT[:400])
        nll = sum(b["tokens"] * math.log(b["perplexity"]) for b in shown["buckets"])
        assert nll == pytest.approx(score.nll * 400, rel=1e-4)


def test_scaled_positions_and_others_are_methods_as_well(everlong, novel):
    names = ["full", "yarn", "linear", "ntk", "self-extend", "dual-chunk"]
    words = ("--set", "factor=2", "--set", "group-size=3", "--tokens", 300, "--bucket", 300)
    result = everlong("compare", novel, "--methods", ",".join(names), *words, "--json")
    told = json.loads(result.out)["results"]
    assert [method["name"] for method in told] == names
    assert [method["options"].get("factor") for method in told] == [None, 2, 2, 2, None, None]
    assert told[4]["options"]["group_size"] == 3
    assert all((method["kept"], method["forgotten"]) == (300, 0) for method in told)
    assert len({method["buckets"][0]["perplexity"] for method in told}) == len(names)


def test_a_system_text_comes_before_standard_input_too(everlong):
    result = everlong("compare", "-", "--system", "Be terse.", *OPTIONS, "--json", stdin=TEXT)
    assert json.loads(result.out)["pinned"] == len("Be terse.\n\n")


def test_an_interrupted_comparison_shows_the_methods_that_were_finished(everlong, novel, monkeypatch):
    def interrupt(self, name, at):
        if name != "stock":
            raise KeyboardInterrupt

    monkeypatch.setattr(ReadingBars, "reading", interrupt)
    result = everlong("compare", novel, *OPTIONS, "--system", "Be terse.")
    assert result.code == 130 and "0 to 100" in result.err
    assert "11 tokens pinned" in result.err and "lm-infinite" not in result.err


def test_the_table_has_a_column_a_method(everlong, novel):
    result = everlong("compare", "-", "--methods", "stock,streaming-llm,full", *OPTIONS, stdin=TEXT)
    assert all(word in result.out for word in ("stock", "streaming-llm", "full", "window 40", "0 to 100"))


def test_pictures_and_numbers_are_written_where_asked(everlong, novel, tmp_path):
    everlong("compare", novel, *OPTIONS, "--output", tmp_path / "out", "--png", tmp_path / "b.png", "--quiet")
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(PNG)
    assert (tmp_path / "b.png").read_bytes().startswith(PNG)
    saved = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert saved["tokens"] == 400 and saved["training_length"] == 64


@pytest.mark.parametrize(
    "words, message",
    [
        (["--methods", "stok"], "unknown method 'stok'; did you mean 'stock'"),
        (["--methods", "full,full"], "each method is compared once"),
        (["--methods", "full", "--attention", "full"], "give one of the two"),
        (["--methods", ","], "name at least one method"),
        (["--set", "wndow=3"], "did you mean 'window'?"),
        (["--tokens", "1"], "perplexity needs at least 2"),
        (["--system", ""], "the text to pin is empty"),
        (
            ["--system", "x" * 38, "--set", "window=40"],
            "has 40 tokens (turn markers included) and the window",
        ),
    ],
)
def test_bad_input_is_one_line(everlong, novel, words, message):
    result = everlong("compare", novel, *words, "--quiet")
    assert result.code == 2 and message in result.err and len(result.err.splitlines()) == 1


def test_the_demo_compares_and_writes_on(everlong, tmp_path, monkeypatch):
    result = everlong(
        "demo", "--tokens", 300, "--bucket", 60, "--set", "window=40", "--output", tmp_path / "out"
    )
    assert result.code == 0
    assert "stock" in result.out and "recall" in result.out and "has forgotten" not in result.out
    assert "goes on writing" in result.err and "300 tokens of" in result.err
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(PNG)
    saved = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert [len(method["continuation"]) > 0 for method in saved["results"]] == [True, True]


def test_the_demo_pins_a_system_text(everlong, tmp_path):
    words = ("--tokens", 300, "--bucket", 60, "--set", "window=40", "--output", tmp_path)
    words = (*words, "--attention", "lm-infinite")
    result = everlong("demo", *words, "--system", "Be terse.")
    saved = json.loads((tmp_path / "demo.json").read_text())
    assert saved["pinned"] == saved["results"][1]["options"]["sinks"] == len("Be terse.\n\n")
    assert saved["results"][0]["seen"] == 311 and "has forgotten 271 of 311" in result.out
    # The first 60 tokens of the text end beyond the 64 that the model was trained on.
    assert "inside the training length" not in result.out
    assert "inside the training length" in everlong("demo", *words).out
