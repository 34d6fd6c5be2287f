"""Sessions under policies that recall: read in pieces, asked, saved, written together."""

from __future__ import annotations

import pytest

from everlong.attention import InfiniteHiP, InfLLM, Policy, Quest, ReAttention, Recall, Tier
from everlong.errors import ConfigurationError
from everlong.llm import LLM
from everlong.reading import Session
from tests.reading.conftest import TEXT, make_llm, next_logits
from tests.ties import on_one_stream
from tests.tiny import byte_llama

POLICIES = {
    "inf-llm": InfLLM(window=60, sinks=4, recalled=24, block=8, representatives=2, group=16),
    "recall": Recall(window=60, sinks=4, recalled=24, block=8, group=16),
    "quest": Quest(window=60, sinks=4, recalled=24, block=8, group=16),
    "infinite-hip": InfiniteHiP(
        window=60, sinks=4, recalled=24, coarse=32, medium=8, block=4, group=16, coarse_steps=9, block_steps=3
    ),
    "re-attention": ReAttention(window=60, sinks=4, recalled=25, votes=2, radius=2, group=16),
}


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> Policy:
    return POLICIES[request.param]


def begun(policy: Policy, text: str = TEXT) -> Session:
    session = make_llm(policy).session()
    session.read(text)
    return session


def test_nothing_is_forgotten(policy):
    stats = begun(policy).stats
    assert stats.tokens_read > 300
    assert (stats.forgotten, stats.kept + stats.recallable + stats.waiting) == (0, stats.tokens_read)
    assert stats.bytes["ram"] > 0


def test_pieces_of_text_make_no_difference(policy):
    whole, pieces = begun(policy), make_llm(policy).session()
    pieces.read(TEXT[at : at + 7] for at in range(0, len(TEXT), 7))
    assert next_logits(whole).equal(next_logits(pieces))


def test_an_answer_leaves_the_session_as_it_was(policy):
    session = begun(policy)
    before = next_logits(session)
    answer = session.ask("Who?", max_new_tokens=12)
    assert next_logits(session).equal(before)
    assert session.ask("Who?", max_new_tokens=12).text == answer.text


def test_a_saved_session_goes_on_bit_by_bit(policy, tmp_path):
    session = begun(policy)
    session.generate(9)
    session.save(tmp_path / "state")
    model, tokenizer = byte_llama()
    with LLM(model, tokenizer, "tiny", policy, tier=Tier("disk")) as llm:
        restored = llm.restore(tmp_path / "state")
        assert restored.stats.bytes["disk"] > 0
        assert restored.generate(20).text == session.generate(20).text


def test_sessions_of_any_length_are_asked_together(policy):
    def check(seed):
        with make_llm(policy) as llm:
            sessions = [llm.session() for _ in range(3)]
            for number, session in enumerate(sessions):
                session.read(TEXT[: 90 + 100 * number - seed])
            alone = [session.ask("Who?", max_new_tokens=10).text for session in sessions]
            together = llm.ask_together(sessions, ["Who?"] * 3, max_new_tokens=10)
            assert [answer.text for answer in together] == alone

    on_one_stream(check) if isinstance(policy, ReAttention) else check(0)


def test_what_is_pinned_is_among_the_sinks(policy):
    with make_llm(policy) as llm:
        session = llm.session()
        session.pin("Be brief.")
        session.read(TEXT)
        assert session._tape.driver.cache.policy.sinks > 4
        assert session.stats.forgotten == 0
        longer = llm.session()
        longer.pin("Be brief. " * 3)
        assert longer._tape.driver.cache.policy.recalled < session._tape.driver.cache.policy.recalled
        with pytest.raises(ConfigurationError, match="the pinned text has .* tokens"):
            llm.session().pin("Be brief. " * 8)
