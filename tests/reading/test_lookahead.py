"""Lookahead decoding: what is written stays the same, and the window and the pool are what they should be."""

from __future__ import annotations

import pytest
import torch

from everlong.attention import FullAttention, Policy
from everlong.attention.branches import Branches
from everlong.errors import UnsupportedUseError
from everlong.reading import Session
from everlong.reading.lookahead import Lookahead
from everlong.reading.speculation import Draft
from tests.attention.my_policy import DilatedWindow
from tests.reading.conftest import POLICIES, SAMPLINGS, TEXT, make_llm, next_logits


def begun(policy: Policy, text: str = TEXT) -> Session:
    session = make_llm(policy, chat=False).session(seed=3)
    session.read(text)
    return session


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("kind", POLICIES)
def test_the_text_is_the_same(kind: str, sampling: str) -> None:
    plain = begun(POLICIES[kind])
    session = plain.fork()
    expected = plain.generate(60, sampling=SAMPLINGS[sampling])
    ours = session.generate(60, sampling=SAMPLINGS[sampling], speculate="lookahead")
    assert (ours.text, ours.tokens, ours.stop_reason) == (
        expected.text,
        expected.tokens,
        expected.stop_reason,
    )
    assert list(session._tape.driver.recent) == list(plain._tape.driver.recent)
    assert session._tape.queue == plain._tape.queue
    torch.testing.assert_close(next_logits(session), next_logits(plain), atol=1e-4, rtol=0)


def test_it_begins_before_the_sinks_are_full() -> None:
    plain = begun(POLICIES["lm-infinite"], "a")
    session = plain.fork()
    assert session.generate(30, speculate="lookahead").text == plain.generate(30).text


def test_right_guesses_save_forwards() -> None:
    plain = begun(FullAttention(), "ab" * 100)
    session, forwards = plain.fork(), []
    written = plain.generate(60).text
    plain.model.attachment.decoder.register_forward_hook(lambda *_: forwards.append(1))
    assert session.generate(60, speculate="lookahead").text == written
    assert 60 / Lookahead.LEVELS <= len(forwards) < 45


def test_a_policy_that_does_not_take_branches_is_refused_by_name() -> None:
    session = make_llm(DilatedWindow()).session()
    session.read(TEXT)
    with pytest.raises(UnsupportedUseError, match="DilatedWindow.*prompt-lookup"):
        session.generate(3, speculate="lookahead")


# --- the window and the pool ----------------------------------------------------------------------------


def path_of(draft: Draft, number: int) -> list[int]:
    assert draft.parents is not None
    return [] if number == 0 else [*path_of(draft, draft.parents[number - 1]), draft.tokens[number - 1]]


def simulated(ahead: Lookahead, text: list[int], steps: int) -> list[int]:
    """Write with a model that follows a rule: the next token is a function of the last two."""

    def after(tokens: list[int]) -> int:
        return (3 * tokens[-1] + 5 * tokens[-2]) % 11

    taken = []
    for _ in range(steps):
        draft = ahead.guess()
        logits = torch.zeros(1 + len(draft.tokens), 11)
        paths = [path_of(draft, number) for number in range(1 + len(draft.tokens))]
        for number, path in enumerate(paths):
            logits[number, after([*text, *path])] = 1
        number, kept = 0, 0
        new = [int(logits[0].argmax())]
        while (following := [n for n, path in enumerate(paths) if path == new]) and kept < 50:
            (number,) = following
            kept += 1
            new.append(int(logits[number].argmax()))
        ahead.judged(kept, logits)
        for token in new:
            text.append(token)
            ahead.add(token)
        taken.append(len(new))
    return taken


def test_the_window_comes_to_foresee_the_text_by_itself() -> None:
    text = [1, 2]
    taken = simulated(Lookahead(text), text, 40)
    assert sum(taken[20:]) / 20 > 2
    assert all(text[i] == (3 * text[i - 1] + 5 * text[i - 2]) % 11 for i in range(2, len(text)))


def test_a_draft_is_window_and_guesses_with_nothing_twice() -> None:
    ahead = Lookahead(list(range(50)) * 2)
    for _ in range(10):
        draft = ahead.guess()
        assert draft.parents is not None
        assert len(set(zip(draft.parents, draft.tokens, strict=True))) == len(draft.tokens)
        most = ahead.WINDOW * (ahead.LEVELS - 1) - 1 + ahead.GUESSES * (ahead.LEVELS - 1)
        assert ahead.WINDOW - 1 <= len(draft.tokens) <= most
        assert Branches([-1, *draft.parents]).height <= ahead.WINDOW + ahead.LEVELS - 2 + 1
        simulated(ahead, [1, 2], 1)


def test_a_column_follows_the_first_level_up_to_it_and_its_own_levels() -> None:
    ahead = Lookahead([5, 6])
    ahead.guess()
    levels = [[10 * level + column for column in range(ahead.WINDOW)] for level in range(1, ahead.LEVELS)]
    ahead._levels = [list(level) for level in levels]
    draft = ahead.guess()
    assert draft.parents is not None
    first = levels[0][1:]
    for column in range(ahead.WINDOW):
        number = ahead._last_level[column]
        assert path_of(draft, number) == [*first[:column], *(level[column] for level in levels[1:])]


def test_the_window_moves_a_level_a_step_and_a_column_for_each_right_guess() -> None:
    ahead = Lookahead([5, 6])
    ahead.guess()
    levels = [[10 * level + column for column in range(ahead.WINDOW)] for level in range(1, ahead.LEVELS)]
    ahead._levels = [list(level) for level in levels]
    draft = ahead.guess()
    logits = torch.zeros(1 + len(draft.tokens), 100)
    for column, number in enumerate(ahead._last_level):
        logits[number, 50 + column] = 1
    ahead.judged(2, logits)
    expected = [*levels[1:], list(range(50, 50 + ahead.WINDOW))]
    assert [level[:-2] for level in ahead._levels] == [level[2:] for level in expected]
    assert list(ahead._pool[12]) == [(22, 32, 42, 52)], "what a column passed through is an n-gram"


def test_the_pool_keeps_the_latest_ngrams_of_each_first_token() -> None:
    text: list[int] = []
    for number in range(10):
        text += [7, 20 + number, 30 + number, 40 + number, 50 + number]
    ahead = Lookahead([*text, 7])
    kept = list(ahead._pool[7])
    assert kept == [(20 + n, 30 + n, 40 + n, 50 + n) for n in range(10 - ahead.GUESSES, 10)]
    draft = ahead.guess()
    guessed = [path_of(draft, number) for number in range(1, 1 + len(draft.tokens))]
    assert all(list(ngram) in guessed for ngram in kept)
