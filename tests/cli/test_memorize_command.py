import json
from typing import get_args

import pytest

from everlong.cli import learning_bars
from everlong.memory.progress import Stage
from everlong.memory.store import MemoryStore

TEXT = "Orla Finch keeps bees in Sligo. She sells honey to Bennet. Her brother paints boats."
FAST = ("--set", "generators=text", "--set", "selection=all", "--set", "passes=1", "--set", "rank=8")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("EVERLONG_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def handbook(tmp_path):
    path = tmp_path / "handbook.md"
    path.write_text(TEXT)
    return path


def test_files_become_a_memory_that_the_other_commands_use(everlong, home, handbook):
    done = everlong("memorize", handbook, "--name", "handbook", *FAST)
    assert done.code == 0, done.err
    assert "learned in 1 segment, 1 pairs" in done.out and "--memory handbook" in done.out
    assert "segment 1 of 1: learning" in done.err and "tokens/s" in done.err and " left" in done.err
    assert [memory.name for memory in MemoryStore().list()] == ["handbook"]
    words = ["--memory", "handbook", "--max-new-tokens", "4"]
    for command in (["ask", "Who?"], ["read", handbook, "--ask", "Who?"], ["generate", "Orla"]):
        result = everlong(command[0], *command[1:], *words)
        assert result.code == 0, result.err
    assert everlong("chat", *words, stdin="Who?\n").code == 0


def test_every_stage_of_learning_is_told(everlong, home, handbook):
    assert set(learning_bars._WORDS) == set(get_args(Stage))
    done = everlong("memorize", handbook, "--name", "handbook", *FAST, "--set", "continuations=1")
    told = [done.err.find(f"segment 1 of 1: {word};") for word in learning_bars._WORDS.values()]
    assert told == sorted(told) and told[0] >= 0, done.err


def test_what_is_not_covered_is_told(everlong, home, handbook):
    handbook.write_text(f"{TEXT} Stop!")
    words = ("--set", "generators=cloze", "--set", "passes=1", "--set", "rank=8", "--force")
    done = everlong("memorize", handbook, "--name", "handbook", *words)
    told = "1 of 4 sentences not covered"
    assert done.code == 0 and told in done.out and told in done.err
    measured = MemoryStore().get("handbook").record.measured
    assert measured["uncovered"] == 1 and measured["worth"]["cloze"]["pairs"] == 5


def test_json_is_the_record(everlong, home, handbook):
    done = everlong("memorize", handbook, "-", "-n", "both", "--json", "-q", *FAST, stdin="More.")
    record = json.loads(done.out)
    assert record["name"] == "both" and record["source"]["characters"] == len(TEXT + "\n\nMore.")
    assert record["recipe"]["values"]["passes"] == 1 and record["pairs"] == 1
    assert not done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "infinite"], "unknown recipe"),
        (["--set", "pases=1"], "did you mean 'passes'"),
        (["--recipe-set", "rank=7"], "would not load everywhere"),
        (["--set", "rank"], "--recipe-set takes KEY=VALUE"),
        (["--name", "../x"], "cannot name a memory"),
    ],
)
def test_bad_options_are_one_line_with_the_remedy(everlong, home, handbook, words, message):
    result = everlong("memorize", handbook, "--name", "handbook", *words)
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1


def test_a_name_that_exists_is_refused_unless_replaced(everlong, home, handbook):
    assert everlong("memorize", handbook, "-n", "a", *FAST).code == 0
    refused = everlong("memorize", handbook, "-n", "a", *FAST)
    assert refused.code == 2 and "there is a memory 'a' already" in refused.err
    assert everlong("memorize", handbook, "-n", "a", "--replace", *FAST).code == 0


def test_a_model_that_does_not_use_the_text_is_told_so(everlong, home, handbook, monkeypatch):
    monkeypatch.setattr("everlong.memory.gate.LEAST_GAIN", 9.0)
    result = everlong("memorize", handbook, "-n", "a", "--set", "generators=cloze", "--set", "passes=1")
    assert result.code == 2 and "nats per token" in result.err and "force" in result.err
    assert not MemoryStore().list()


def test_memories_of_a_state_are_settled(everlong, home, handbook, tmp_path):
    assert everlong("memorize", handbook, "-n", "a", *FAST).code == 0
    state = tmp_path / "talk.state"
    assert (
        everlong("chat", "--memory", "a", "--state", state, "--max-new-tokens", "2", stdin="Hi\n").code == 0
    )
    again = everlong("chat", "--memory", "a", "--state", state, stdin="Hi\n")
    assert again.code == 2 and "leave out --memory" in again.err
    assert everlong("chat", "--state", state, "--max-new-tokens", "2", stdin="Hi\n").code == 0


def test_questions_are_answered_as_json(everlong, home):
    result = everlong("ask", "Who?", "Where?", "--json", "-q", "--max-new-tokens", "3")
    answers = json.loads(result.out)["answers"]
    assert [answer["question"] for answer in answers] == ["Who?", "Where?"]
    assert everlong("ask", "Who?", "--memory", "none").code == 2


def test_a_memory_is_chosen_for_each_question_and_named(everlong, home, handbook, monkeypatch):
    monkeypatch.setattr("everlong.memory.routing.Routing.is_surer", lambda *_: True)
    assert everlong("memorize", handbook, "-n", "bees", *FAST).code == 0
    few = ("--memory", "auto", "--max-new-tokens", "2")
    questions = ("Where does Orla Finch keep her bees?", "What is the capital of France?")
    asked = everlong("ask", *questions, *few)
    assert asked.err.count("(memory: bees)") == asked.err.count("(memory: none)") == 1
    assert "(memory" not in asked.out
    answers = json.loads(everlong("ask", *questions, "--json", "-q", *few).out)["answers"]
    assert [answer["memories"] for answer in answers] == [["bees"], []]
    assert "(memory: bees)" in everlong("chat", *few, stdin=f"{questions[0]}\n").err
    assert "(memory: bees)" in everlong("generate", "Orla Finch keeps", *few).err
    read = everlong("read", handbook, "--ask", questions[0], "--ask", questions[1], *few)
    assert "(memory: bees)" in read.err and "(memory: none)" in read.err
    by_hand = everlong("ask", questions[0], "--memory", "bees", "--max-new-tokens", "2")
    assert by_hand.code == 0 and "(memory" not in by_hand.err


def test_a_saved_chat_goes_on_choosing(everlong, home, handbook, tmp_path, monkeypatch):
    monkeypatch.setattr("everlong.memory.routing.Routing.is_surer", lambda *_: True)
    assert everlong("memorize", handbook, "-n", "bees", *FAST).code == 0
    state, few = tmp_path / "talk.state", ("--max-new-tokens", "2")
    assert everlong("chat", "--memory", "auto", "--state", state, *few, stdin="Hi\n").code == 0
    again = everlong("chat", "--state", state, *few, stdin="Who sells honey to Bennet?\n")
    assert "(memory: bees)" in again.err


def test_reading_learns_what_leaves_the_window_and_the_rest_unless_it_goes_on(everlong, home, handbook):
    words = ["--memorize", "novel", "--recipe", "temp-lora", "--set", "window=40"]
    state = home.parent / "novel.state"
    waits = everlong("read", handbook, *words, "--state", state)
    assert waits.code == 0 and not MemoryStore().list(), waits.err
    done = everlong("read", handbook, *words[:4], "--state", state)
    assert done.code == 0 and not MemoryStore().list(), done.err  # a segment is longer than both
    done = everlong("read", handbook, *words, "--ask", "Who?", "--max-new-tokens", "4")
    assert done.code == 0, done.err
    assert f"memory novel: {len(TEXT)} tokens learned in 1 segment\n" in done.err
    assert "handbook.md: segment 1: learning" in done.err
    assert MemoryStore().get("novel").record.source.characters == len(TEXT)
    refused = everlong("read", handbook, *words)
    assert refused.code == 2 and "there is a memory 'novel' already" in refused.err
    assert everlong("read", handbook, *words, "--replace").code == 0
    unknown = everlong("read", handbook, "--memorize", "a", "--recipe", "infinite")
    assert unknown.code == 2 and "unknown recipe" in unknown.err
    cartridge = everlong("read", handbook, "--memorize", "a", "--recipe", "cartridge")
    assert cartridge.code == 2 and "not learned in passing" in cartridge.err
    chooses = everlong("read", handbook, "--memorize", "a", "--memory", "auto")
    assert chooses.code == 2 and "chooses a memory for each answer" in chooses.err


def test_how_reading_learns_can_be_said(everlong, home, handbook):
    words = ["--memorize", "a", "--recipe", "temp-lora", "--set", "window=40"]
    settings = ["--recipe-set", "passes=1", "--recipe-set", "rank=8"]
    done = everlong("read", handbook, *words, *settings, "--force")
    assert done.code == 0, done.err
    recipe = MemoryStore().get("a").record.recipe
    assert recipe.name == "temp-lora"
    recipe = recipe.values
    assert (recipe["passes"], recipe["rank"], recipe["generators"]) == (1, 8, ["text"])
    unknown = everlong("read", handbook, *words, "--recipe-set", "pases=1")
    assert unknown.code == 2 and "did you mean 'passes'" in unknown.err
    odd = everlong("read", handbook, *words, "--recipe-set", "passes")
    assert odd.code == 2 and "--recipe-set takes KEY=VALUE" in odd.err
    for alone in (["--recipe-set", "passes=1"], ["--recipe", "lift"], ["--replace"], ["--force"]):
        nothing = everlong("read", handbook, *alone)
        assert nothing.code == 2 and "give --memorize NAME too" in nothing.err
