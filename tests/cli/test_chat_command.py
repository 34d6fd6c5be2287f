import json

import pytest

from everlong.attention import Recall
from everlong.cli import chat_command
from everlong.llm import load

OPTIONS = ("--set", "window=60", "--max-new-tokens", 6)


@pytest.fixture
def session(folder):
    with load(folder, Recall(window=60), device="cpu") as llm:
        yield llm.session()


def said(session, *messages):
    return [session.chat(message, max_new_tokens=6).text for message in messages]


def test_each_line_is_a_message_and_both_sides_stay(everlong, session):
    result = everlong("chat", *OPTIONS, stdin="Hello there\n\nHow are you?\n")
    assert result.code == 0
    assert result.out == "".join(f"{answer}\n" for answer in said(session, "Hello there", "How are you?"))


def test_with_json_each_answer_is_a_line(everlong, session):
    result = everlong("chat", "--json", *OPTIONS, stdin="Hello\nAgain\n")
    answers = [json.loads(line) for line in result.out.splitlines()]
    assert [answer["answer"] for answer in answers] == said(session, "Hello", "Again")
    assert [answer["message"] for answer in answers] == ["Hello", "Again"]
    assert answers[1]["stats"]["tokens_written"] == session.stats.tokens_written


def test_it_goes_on_from_a_state_file_and_saves_to_it(everlong, session, tmp_path):
    state = tmp_path / "talk.state"
    first = everlong("chat", *OPTIONS, "--state", state, stdin="Hello\n")
    second = everlong("chat", "--max-new-tokens", 6, "--state", state, stdin="Again\n")
    assert [first.out.rstrip("\n"), second.out.rstrip("\n")] == [
        text.rstrip("\n") for text in said(session, "Hello", "Again")
    ]


def test_a_file_is_read_into_the_conversation(everlong, session, novel):
    result = everlong("chat", *OPTIONS, stdin=f"/read {novel}\nWho?\n")
    session.read(novel)
    assert result.out == f"{said(session, 'Who?')[0]}\n"
    assert "tokens read" in result.err


def test_reset_begins_again_with_the_system_text(everlong, folder, session):
    result = everlong("chat", "--system", "Be terse.", *OPTIONS, stdin="Hello\n/reset\nHello\n")
    session.pin("Be terse.")
    (answer,) = said(session, "Hello")
    assert result.out == f"{answer}\n" * 2


def test_save_writes_a_state(everlong, tmp_path, folder):
    state = tmp_path / "talk.state"
    everlong("chat", *OPTIONS, stdin=f"Hello\n/save {state}\nAgain\n")
    with load(folder, device="cpu") as llm:
        assert llm.restore(state).stats.tokens_written == 6


def test_stats_and_help_are_remarks(everlong):
    result = everlong("chat", *OPTIONS, stdin="Hello\n/stats\n/help\n/exit\nnever said\n")
    assert len(result.out.splitlines()) >= 1 and "6 written" in result.err
    assert all(name in result.err for name in ("/read FILE", "/save FILE", "/stats", "/reset", "/exit"))


@pytest.mark.parametrize(
    "line, message",
    [
        ("/raed novel.txt", "unknown command '/raed'; did you mean '/read'"),
        ("/read nowhere.txt", "cannot open nowhere.txt"),
        ("/read", "/read needs the name of a text file"),
        ("/save", "/save needs the name of a file"),
    ],
)
def test_a_mistake_does_not_end_the_chat(everlong, session, line, message):
    result = everlong("chat", *OPTIONS, stdin=f"{line}\nHello\n")
    assert result.code == 0 and message in result.err
    assert result.out == f"{said(session, 'Hello')[0]}\n"


@pytest.fixture
def interrupted_once(monkeypatch):
    """Ctrl-C in the first answer."""
    real, calls = chat_command.print_as_written, []

    def show(pieces, **options):
        calls.append(None)
        if len(calls) > 1:
            return real(pieces, **options)
        next(pieces)
        pieces.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_command, "print_as_written", show)


def test_ctrl_c_ends_an_answer_and_not_the_chat(everlong, interrupted_once):
    result = everlong("chat", "--json", *OPTIONS, stdin="Hello\nAgain\n")
    (answer,) = map(json.loads, result.out.splitlines())
    assert result.code == 0 and "interrupted" in result.err
    assert answer["message"] == "Again" and answer["stats"]["tokens_written"] > answer["tokens"]


def test_whatever_ends_the_chat_it_is_saved(everlong, folder, tmp_path, monkeypatch):
    state, messages = tmp_path / "talk.state", iter(["Hello"])

    def ask():
        try:
            return next(messages)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(chat_command, "_next_message", ask)
    assert everlong("chat", *OPTIONS, "--state", state).code == 130
    with load(folder, device="cpu") as llm:
        assert llm.restore(state).stats.tokens_written == 6


def test_a_state_that_could_not_be_saved_is_refused_before_the_chat(everlong):
    result = everlong("chat", *OPTIONS, "--state", "nowhere/talk.state", stdin="Hello\n")
    assert result.code == 2 and "there is no folder nowhere" in result.err and not result.out


def test_reset_says_that_earlier_instructions_are_gone(everlong, tmp_path):
    state = tmp_path / "talk.state"
    everlong("chat", "--system", "Be terse.", *OPTIONS, "--state", state, stdin="Hello\n")
    result = everlong("chat", "--max-new-tokens", 6, "--state", state, stdin="/reset\n")
    assert "instructions pinned before the state was saved are gone" in result.err
