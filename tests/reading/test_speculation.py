"""Guessing ahead: what is written is what would have been written, whatever was guessed."""

from __future__ import annotations

import pytest
import torch

from everlong.attention import DualChunk, FullAttention, NTKScaling, Policy, YaRN, make_policy
from everlong.errors import NumericalError, UnknownNameError, UnsupportedUseError
from everlong.reading import Session, writing
from everlong.reading.sampling import Sampler
from everlong.reading.speculation import SPECULATORS, Draft, PromptLookup, Speculator
from tests.reading.conftest import POLICIES, SAMPLINGS, TEXT, make_llm, next_logits

NO_LOGITS = torch.empty(0)


class Oracle(Speculator):
    """Guesses from a script: what will really come, spoiled after some tokens."""

    script: list[int] = []
    right = 3

    def __init__(self, read: object) -> None:
        self.at = 0
        self.kept: list[int] = []

    def add(self, token: int) -> None:
        self.at += 1

    def guess(self) -> Draft:
        truth = self.script[self.at : self.at + self.right]
        return Draft([*truth, 5, 6])

    def judged(self, kept: int, logits: torch.Tensor) -> None:
        self.kept.append(kept)


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> type[Oracle]:
    monkeypatch.setattr(SPECULATORS, "_entries", {**SPECULATORS._entries, "oracle": Oracle})
    return Oracle


UNBRANCHED = {"dual-chunk": DualChunk(chunk=50, positions=64), "yarn": YaRN()}


def begun(policy: Policy, seed: int | None = 3) -> Session:
    session = make_llm(policy).session(seed=seed)
    session.read(TEXT)
    return session


@pytest.mark.thin
@pytest.mark.parametrize("right", [0, 1, 3, 30])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("policy", [*POLICIES, *UNBRANCHED])
def test_the_text_is_the_same_whether_guesses_are_right_or_wrong(policy, sampling, right, oracle):
    plain, guessed = (begun((POLICIES | UNBRANCHED)[policy]) for _ in range(2))
    expected = plain.generate(40, sampling=SAMPLINGS[sampling])
    written = list(plain._tape.driver.recent)[-expected.tokens + 1 :] + plain._tape.queue
    oracle.script, oracle.right = written, right
    ours = guessed.generate(40, sampling=SAMPLINGS[sampling], speculate="oracle")
    assert (ours.text, ours.tokens, ours.stop_reason) == (
        expected.text,
        expected.tokens,
        expected.stop_reason,
    )
    assert guessed._tape.queue == plain._tape.queue
    assert list(guessed._tape.driver.recent) == list(plain._tape.driver.recent)
    counts = ("tokens_read", "tokens_written", "kept", "recallable", "forgotten", "waiting")
    assert [getattr(ours.stats, name) for name in counts] == [
        getattr(expected.stats, name) for name in counts
    ]
    torch.testing.assert_close(next_logits(guessed), next_logits(plain), atol=1e-4, rtol=0)


def test_right_guesses_save_forwards(oracle, monkeypatch):
    plain, session = begun(POLICIES["full"]), begun(POLICIES["full"])
    plain.generate(40)
    oracle.script, oracle.right = list(plain._tape.driver.recent)[-39:] + plain._tape.queue, 7
    forwards = []
    session.model.attachment.decoder.register_forward_hook(lambda *_: forwards.append(1))
    session.generate(40, speculate="oracle")
    assert len(forwards) <= 1 + 40 // 8 + 1


@pytest.mark.parametrize("limit", range(1, 9))
def test_it_stops_at_the_limit_and_at_a_stop_string(limit, oracle):
    plain = begun(POLICIES["lm-infinite"])
    whole = plain.fork().generate(30)
    oracle.script = list(plain.fork()._tape.driver.recent)  # wrong ones
    for options in ({"max_new_tokens": limit}, {"max_new_tokens": 30, "stop": whole.text[limit : limit + 2]}):
        expected, session = plain.fork().generate(**options), plain.fork()
        ours = session.generate(**options, speculate="oracle")
        assert (ours.text, ours.tokens, ours.stop_reason) == (
            expected.text,
            expected.tokens,
            expected.stop_reason,
        )


def test_an_answer_that_is_not_read_to_its_end_leaves_a_usable_session():
    session, plain = begun(POLICIES["lm-infinite"]), begun(POLICIES["lm-infinite"])
    pieces = session.stream(30, speculate="prompt-lookup")
    written = "".join(next(pieces) for _ in range(4))
    pieces.close()
    rest = session.generate(10).text
    assert plain.generate(40).text.startswith(written)
    assert rest


@pytest.mark.parametrize("at", range(1, 7))
def test_an_error_while_judging_loses_no_token(at, oracle, monkeypatch):
    plain, session = begun(POLICIES["lm-infinite"]), begun(POLICIES["lm-infinite"])
    whole = plain.fork().generate(20)
    written = plain.fork()
    written.generate(20)
    oracle.script, oracle.right = list(written._tape.driver.recent)[-19:] + written._tape.queue, 30
    calls = []

    def breaking(sampling, generator):
        sampler = Sampler(sampling, generator)

        def choose(logits, recent):
            calls.append(1)
            if len(calls) == at:
                raise NumericalError("not finite")
            return sampler(logits, recent)

        return choose

    with monkeypatch.context() as patch:
        patch.setattr(writing, "Sampler", breaking)
        with pytest.raises(NumericalError):
            session.generate(20, speculate="oracle")
    stats = session.stats
    assert stats.tokens_written == at - 1
    held = stats.kept + stats.recallable + stats.forgotten + stats.waiting
    assert stats.tokens_read + stats.tokens_written == held
    before = plain.generate(at - 1).text if at > 1 else ""
    assert before + session.generate(20 - (at - 1)).text == whole.text


# --- prompt lookup ----------------------------------------------------------------------------------


def test_prompt_lookup_guesses_what_followed_before():
    lookup = PromptLookup([1, 2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4])
    assert list(lookup.guess().tokens) == [5, 6, 7, 8]
    lookup.add(6)
    assert list(lookup.guess().tokens) == []
    for token in (8, 9):
        lookup.add(token)
    assert list(lookup.guess().tokens) == [2, 3, 4, 6], "two tokens are enough where three are new"


def test_prompt_lookup_takes_the_latest_occurrence():
    lookup = PromptLookup([1, 2, 3, 10, 1, 2, 3, 11, 1, 2, 3])
    assert list(lookup.guess().tokens)[:1] == [11]


def test_prompt_lookup_guesses_further_while_it_is_right():
    lookup = PromptLookup(list(range(50)) + [0, 1, 2])
    lengths = []
    for kept in (4, 8, 16, 16, 0, 0, 0, 0):
        lengths.append(len(lookup.guess().tokens))
        lookup.judged(kept, NO_LOGITS)
    assert lengths == [4, 8, 16, 16, 16, 8, 4, 2]


def test_prompt_lookup_counts_a_guess_cut_short_as_right():
    lookup = PromptLookup([1, 2, 3, 1, 2, 3])
    assert list(lookup.guess().tokens) == [1, 2, 3]
    lookup.judged(3, NO_LOGITS)
    for token in (1, 2, 3) * 5:
        lookup.add(token)
    assert len(lookup.guess().tokens) == 3, "there is no more between the two occurrences"
    other = PromptLookup(list(range(50)) + [0, 1, 2])
    other.guess()
    other.judged(3, NO_LOGITS)
    assert len(other.guess().tokens) == 4


def test_prompt_lookup_repeats_a_text_in_fewer_forwards():
    llm = make_llm(FullAttention())
    session = llm.session()
    session.read("ab" * 200)
    plain, ours = session.fork(), session.fork()
    forwards = []
    llm.handle.decoder.register_forward_hook(lambda *_: forwards.append(1))
    expected = plain.generate(60)
    single = len(forwards)
    assert ours.generate(60, speculate="prompt-lookup").text == expected.text
    assert len(forwards) - single < single


# --- refused ----------------------------------------------------------------------------------------


def test_an_unknown_way_is_answered_with_near_ones():
    with pytest.raises(UnknownNameError, match="did you mean 'prompt-lookup'"):
        begun(FullAttention()).generate(3, speculate="prompt-lokup")


def test_what_is_refused_leaves_the_session_as_it_was():
    session = begun(FullAttention())
    before = session.stats.tokens_read
    with pytest.raises(UnknownNameError):
        session.chat("hi", speculate="lookahed")
    assert session.stats.tokens_read == before and session._tape.place == "user"


def test_surprisal_and_speculation_exclude_each_other():
    session = make_llm().session(surprisal=True)
    session.read(TEXT)
    with pytest.raises(UnsupportedUseError, match="leave speculate out"):
        session.generate(3, speculate="prompt-lookup")


def test_a_table_that_follows_the_stream_takes_no_guesses_and_chunks_none_that_branch():
    with pytest.raises(UnsupportedUseError, match="NTKScaling uses follows the length"):
        begun(NTKScaling()).generate(3, speculate="prompt-lookup")
    with pytest.raises(UnsupportedUseError, match="DualChunk does not take tokens that follow in several"):
        begun(DualChunk()).generate(3, speculate="lookahead")


@pytest.mark.parametrize("name", ["recall", "re-attention"])
@pytest.mark.parametrize("speculate", ["prompt-lookup", "lookahead"])
@pytest.mark.parametrize("before", [20, 3, -40])
def test_policies_that_recall_for_groups_take_guesses_until_something_left_the_window(
    name, speculate, before, monkeypatch
):
    """Begin so many tokens before the window is full; what is written goes on beyond."""
    read = begun(FullAttention()).stats.tokens_read
    more = {"block": 8} if name == "recall" else {"radius": 2}
    policy = make_policy(name, {"window": read + before, "sinks": 4, **more})
    plain = begun(policy).generate(60)
    session, together = begun(policy), []
    run = session._tape.driver.run_tentatively

    def noted(ids, *others):
        together.append(len(ids))
        return run(ids, *others)

    monkeypatch.setattr(session._tape.driver, "run_tentatively", noted)
    guessed = session.generate(60, speculate=speculate)
    assert guessed.text == plain.text and guessed.tokens == plain.tokens
    assert before == 3 or bool(together) == (before == 20)
