"""Sessions under policies that choose what to keep: read, asked, saved, pinned, written together."""

from __future__ import annotations

import pytest

from everlong.attention import H2O, InfiniPot, Policy, PyramidKV, SirLLM, SnapKV
from everlong.errors import UnsupportedUseError
from everlong.reading import Session
from tests.reading.conftest import TEXT, make_llm

POLICIES = {
    "h2o": H2O(window=60, sinks=4, group=8),
    "sir-llm": SirLLM(window=60, group=8, decay=0.5),
    "infini-pot": InfiniPot(window=60, recent=8, group=8),
    "snap-kv": SnapKV(budget=60, observed=8),
    "pyramid-kv": PyramidKV(budget=60, observed=8),
}


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> Policy:
    return POLICIES[request.param]


def begun(policy: Policy) -> Session:
    session = make_llm(policy).session(chunk=50)
    session.read(TEXT)
    return session


def test_the_accounts_say_how_much_is_forgotten_and_when(policy: Policy) -> None:
    session = begun(policy)
    stats = session.stats
    assert stats.tokens_read > 300 and stats.kept + stats.forgotten + stats.waiting == stats.tokens_read
    bounded = isinstance(policy, H2O | SirLLM | InfiniPot)
    assert stats.kept <= 60 if bounded else stats.forgotten == 0
    session.generate(5)
    stats = session.stats
    run = stats.tokens_read + stats.tokens_written - stats.waiting
    assert stats.kept + stats.forgotten == run
    most = 60 + 5 if not isinstance(policy, PyramidKV) else 2 * 60 + 5
    assert stats.kept <= (60 if bounded else most) and stats.forgotten > 0


def test_an_answer_leaves_the_session_as_it_was_and_a_saved_one_goes_on(policy: Policy, tmp_path) -> None:
    session = begun(policy)
    answer = session.ask("Who?", max_new_tokens=8).text
    assert session.ask("Who?", max_new_tokens=8).text == answer
    session.generate(4)
    session.save(tmp_path / "state")
    with make_llm(policy) as llm:
        assert llm.restore(tmp_path / "state").generate(12).text == session.generate(12).text


def test_sessions_are_asked_together(policy: Policy) -> None:
    with make_llm(policy) as llm:
        sessions = [llm.session() for _ in range(2)]
        for number, session in enumerate(sessions):
            session.read(TEXT[: 90 + 100 * number])
        alone = [session.ask("Who?", max_new_tokens=6).text for session in sessions]
        together = llm.ask_together(sessions, ["Who?"] * 2, max_new_tokens=6)
        assert [answer.text for answer in together] == alone


def test_what_is_pinned_is_among_the_sinks(policy: Policy) -> None:
    with make_llm(policy) as llm:
        session = llm.session()
        session.pin("Be brief.")
        session.read(TEXT)
        session.generate(2)
        sinks = session.policy.sinks
        assert sinks > 4
        for memory in session._tape.driver.cache.memories.values():
            assert memory.index["at"].sort(-1).values[0, 0, :sinks].tolist() == list(range(sinks))


def test_no_guesses_are_taken(policy: Policy) -> None:
    session = begun(policy)
    with pytest.raises(UnsupportedUseError, match="leave speculate out"):
        session.generate(3, speculate="prompt-lookup")


def test_each_turn_of_a_conversation_counts_less_than_the_next() -> None:
    scores = []
    for decay in (1.0, 0.5):
        session = make_llm(SirLLM(window=400, decay=decay)).session()
        session.chat("Who are you?", max_new_tokens=3)
        memory = next(iter(session._tape.driver.cache.memories.values()))
        scores.append(memory.index["score"][0, 0, 2:10].clone())
    assert (scores[0] > 0).any() and scores[1].equal(scores[0] / 2)
