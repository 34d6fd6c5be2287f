import json

import pytest

from everlong.attention import Recall, StreamingLLM, YaRN
from everlong.llm import load
from everlong.reading.session import Session
from tests.cli.conftest import TEXT

WINDOW = ("--set", "window=40")


@pytest.fixture
def session(folder):
    """What the command should do, by the library."""
    with load(folder, Recall(window=40), device="cpu") as llm:
        yield llm.session()


def test_it_reads_a_file_and_answers_as_a_session_does(everlong, novel, session):
    result = everlong("read", novel, *WINDOW, "--ask", "Who?", "--ask", "Why?", "--max-new-tokens", 9)
    session.read(novel)
    expected = [session.ask(question, max_new_tokens=9).text for question in ("Who?", "Why?")]
    assert result.code == 0
    assert result.out == "".join(f"{answer}\n" for answer in expected)
    assert "Who?" in result.err and f"{session.stats.recallable:,} recallable" in result.err


def test_several_files_and_standard_input_are_one_stream(everlong, novel, session):
    result = everlong("read", novel, "-", novel, "--json", *WINDOW, stdin="And then it rained.")
    session.read(TEXT + "And then it rained." + TEXT)
    stats = json.loads(result.out)["stats"]
    assert result.code == 0
    for name in ("tokens_read", "kept", "recallable", "forgotten"):
        assert stats[name] == getattr(session.stats, name)


def test_json_is_one_document_with_answers_and_accounts(everlong, novel, session):
    result = everlong("read", novel, "--json", "--quiet", "--ask", "Who?", "--max-new-tokens", 5, *WINDOW)
    session.read(novel)
    (answer,) = json.loads(result.out)["answers"]
    expected = session.ask("Who?", max_new_tokens=5)
    assert (answer["question"], answer["answer"]) == ("Who?", expected.text)
    assert (answer["tokens"], answer["stop_reason"]) == (expected.tokens, expected.stop_reason)
    assert result.err == ""


def test_a_scaling_is_an_attention_method(everlong, novel, tmp_path, folder):
    state = tmp_path / "novel.state"
    words = ("--attention", "yarn", "--set", "factor=2", "--json", "--state", state)
    told = json.loads(everlong("read", novel, *words).out)["stats"]
    assert (told["kept"], told["forgotten"]) == (told["tokens_read"] - told["waiting"], 0)
    with load(folder, YaRN(factor=2), device="cpu") as llm:
        session = llm.session()
        session.read(TEXT)
        assert llm.restore(state).policy == YaRN(factor=2)
        assert llm.restore(state).generate(8).text == session.generate(8).text


def test_a_state_file_is_begun_then_gone_on_with(everlong, novel, tmp_path, folder, session):
    state = tmp_path / "novel.state"
    for text in (TEXT, "More of it."):
        novel.write_text(text)
        assert everlong("read", novel, "--state", state, *(WINDOW if text == TEXT else ())).code == 0
    session.read(TEXT)
    session.read("More of it.")
    with load(folder, device="cpu") as llm:
        restored = llm.restore(state)
        assert restored.policy == session.policy
        assert restored.stats.tokens_read == session.stats.tokens_read
        assert restored.generate(8).text == session.generate(8).text


@pytest.mark.parametrize(
    "option, name",
    [
        (("--set", "window=20"), "--set"),
        (("--attention", "full"), "--attention"),
        (("--system", "Be terse."), "--system"),
        (("--surprisal",), "--surprisal"),
        (("--seed", "1"), "--seed"),
    ],
)
def test_a_state_file_is_not_silently_read_under_other_options(everlong, novel, tmp_path, option, name):
    state = tmp_path / "novel.state"
    everlong("read", novel, "--state", state, *WINDOW)
    before = state.read_bytes()
    result = everlong("read", novel, "--state", state, *option)
    assert result.code == 2 and f"leave out {name}" in result.err
    assert state.read_bytes() == before


def test_ctrl_c_saves_what_was_read(everlong, novel, tmp_path, folder, monkeypatch):
    state, read = tmp_path / "novel.state", Session.read

    def interrupted(session, source, progress, **rest):
        def stop(at):
            raise KeyboardInterrupt

        return read(session, source, progress=stop, **rest)

    monkeypatch.setattr(Session, "read", interrupted)
    result = everlong("read", novel, "--state", state, *WINDOW)
    assert result.code == 130 and "saved to" in result.err and "interrupted" in result.err
    assert " waiting; " in result.err, "for the model"
    with load(folder, device="cpu") as llm:
        stats = llm.restore(state).stats
    assert 0 < stats.tokens_read - stats.waiting < len(TEXT)


def test_a_bad_place_in_a_later_file_keeps_what_was_read_before_it(everlong, novel, tmp_path, folder):
    state, binary = tmp_path / "novel.state", tmp_path / "picture.png"
    binary.write_bytes(b"\x89PNG\0\0\0")
    result = everlong("read", novel, binary, "--state", state, *WINDOW)
    assert result.code == 2 and "picture.png is not a text file: byte 4 is a NUL" in result.err
    with load(folder, device="cpu") as llm:
        assert llm.restore(state).stats.tokens_read >= len(TEXT)


def test_where_nothing_could_be_read_the_error_stands_alone(everlong, tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Élan".encode("latin1"))
    result = everlong("read", latin, *WINDOW)
    assert result.code == 2 and "iconv" in result.err and "tokens read" not in result.err


def test_a_system_text_is_pinned(everlong, novel, folder):
    result = everlong("read", novel, "--system", "Be terse.", "--json", *WINDOW)
    with load(folder, Recall(window=40), device="cpu") as llm:
        session = llm.session()
        session.pin("Be terse.")
        session.read(novel)
    assert json.loads(result.out)["stats"]["bytes"] == session.stats.bytes
    assert session.policy.sinks > 16


def test_perplexity_is_reported_when_asked_for(everlong, novel, folder):
    asked, not_asked = (
        json.loads(everlong("read", novel, "--json", *WINDOW, *option).out)["stats"]["perplexity"]
        for option in (["--surprisal"], [])
    )
    with load(folder, Recall(window=40), device="cpu") as llm:
        session = llm.session(surprisal=True)
        session.read(novel)
    assert not_asked is None and asked == pytest.approx(session.stats.perplexity, rel=1e-5)


def test_other_methods_by_name(everlong, novel, folder):
    result = everlong("read", novel, "--attention", "streaming-llm", *WINDOW, "--ask", "Who?", "--quiet")
    with load(folder, StreamingLLM(window=40), device="cpu") as llm:
        session = llm.session()
        session.read(novel)
        assert result.out == f"{session.ask('Who?', max_new_tokens=512).text}\n"


RECALLS = (*WINDOW, "--attention", "lm-infinite", "--set", "top_k=5", "--set", "top_k_layers=0")


def test_what_leaves_the_window_lies_where_the_tier_says(everlong, novel, tmp_path):
    held = {}
    for tier in ("ram", "disk", tmp_path):
        words = ("--tier", tier, "--tier-precision", "int8", "--quiet", "--json")
        stats = json.loads(everlong("read", novel, *RECALLS, *words).out)["stats"]
        assert stats["recallable"] >= len(TEXT) - 40 and stats["forgotten"] == 0
        held[tier] = stats["bytes"]
    assert held["disk"] == held[tmp_path] and held["disk"]["disk"] > 0
    assert held["disk"]["ram"] + held["disk"]["disk"] == held["ram"]["ram"] and held["ram"]["disk"] == 0
    assert held["disk"]["window"] == held["ram"]["window"]


def test_beyond_the_limit_of_a_tier_the_oldest_is_forgotten(everlong, novel, tmp_path):
    state = tmp_path / "novel.state"
    words = ("--tier-limit", "20kB", "--quiet", "--json")
    stats = json.loads(everlong("read", novel, *RECALLS, *words, "--state", state).out)["stats"]
    assert stats["recallable"] > 0 and stats["forgotten"] > 0
    assert stats["recallable"] + stats["forgotten"] >= len(TEXT) - 40
    more = json.loads(everlong("read", novel, *words, "--state", state).out)["stats"]
    assert more["forgotten"] > stats["forgotten"] + 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--tier", "disk", "--attention", "lm-infinite"],
            "LMInfinite keeps nothing of what leaves its window: --tier",
        ),
        (["--tier", "disk", "--attention", "full"], "FullAttention keeps nothing of what leaves"),
        (
            ["--tier", "disk", "--dry-run", "--attention", "lm-infinite"],
            "LMInfinite keeps nothing of what leaves its window: --tier",
        ),
        ([*RECALLS, "--tier", "no/such/folder"], "a tier cannot lie in no/such/folder"),
        ([*RECALLS, "--tier-precision", "int7"], "precision='int7' is not known"),
        ([*RECALLS, "--tier-limit", "much"], "'much' is no number of bytes: write 4GB"),
        ([*RECALLS, "--tier-limit", "0"], "a number of bytes above 0"),
    ],
)
def test_a_tier_that_cannot_be_is_refused(everlong, novel, words, message):
    result = everlong("read", novel, *words)
    assert result.code != 0 and message in " ".join(result.err.split())


def test_a_dry_run_counts_and_reads_nothing(everlong, novel, tmp_path):
    state = tmp_path / "novel.state"
    result = everlong("read", novel, novel, "--dry-run", "--state", state, "--json", *WINDOW)
    cost = json.loads(result.out)
    assert (
        cost["tokens"] == 2 * len(TEXT) and cost["files"] == [{"name": str(novel), "tokens": len(TEXT)}] * 2
    )
    assert cost["seconds"] > 0 and cost["last_tokens_per_second"] > 0
    assert not state.exists()
    really = json.loads(everlong("read", novel, novel, "--json", *WINDOW).out)["stats"]["bytes"]
    for place in ("window", "ram", "disk"):
        assert really[place] * 0.8 <= cost["bytes"][place] <= really[place] * 1.2
    forgets = ("--attention", "lm-infinite", "--json", *WINDOW)
    cost = json.loads(everlong("read", novel, "--dry-run", *forgets).out)
    assert cost["bytes"] == json.loads(everlong("read", novel, *forgets).out)["stats"]["bytes"]
    words = everlong("read", novel, "--dry-run", *WINDOW).out
    assert f"{len(TEXT):,} tokens" in words and "seconds" in words and "held at the end" in words


@pytest.mark.parametrize(
    "words, message",
    [
        (["missing.txt"], "cannot open missing.txt"),
        (["."], ". is a directory"),
        (["-", "-"], "standard input (-) can be read once"),
        (["-"], "is empty: there is nothing to read"),
        (["-", "--state", "nowhere/a.state"], "there is no folder nowhere"),
        (["-", "--attention", "lm-infinit"], "did you mean 'lm-infinite'"),
        (["-", "--set", "windw=3"], "unknown option of recall 'windw'; did you mean 'window'?"),
        (["-", "--set", "window=10"], "Recall: a window of 10 cannot hold 16 sinks"),
        (["-", "--set", "window=many"], "window must be a whole number"),
        (["-", "--ask", ""], "the question is empty"),
        (["-", "--top-p", "0.5"], "temperature=0 draws nothing"),
        (["-", "--threads", "0"], "--threads"),
        (["-", "--dtype", "float31"], "float31"),
        (["-", "--device", "abacus"], "abacus"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(everlong, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    stdin = "" if "nothing to read" in message else "Some text."
    result = everlong("read", *words, "--quiet", stdin=stdin)
    assert result.code == 2 and message in result.err
    assert len(result.err.splitlines()) == 1 and not list(tmp_path.iterdir())
