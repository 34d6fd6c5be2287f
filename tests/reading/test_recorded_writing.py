"""Sessions write by recorded steps what they write without, alone and together."""

import itertools

import pytest

from everlong.reading import Sampling
from tests.attention.trace_recorder import RECORDERS, TraceRecorder
from tests.reading.conftest import POLICIES, SAMPLINGS, TEXT, make_llm, next_logits

WINDOWED = ["lm-infinite", "streaming-llm"]


@pytest.fixture(params=itertools.product(WINDOWED, RECORDERS), ids=" on ".join)
def both(request):
    """The same model twice, once with a recorder."""
    policy, recorder = request.param
    with make_llm(POLICIES[policy]) as recording, make_llm(POLICIES[policy]) as plain:
        recording.handle.steps.recorder = RECORDERS[recorder]()
        plain.handle.steps.stop()
        yield recording, plain


def replayed(llm):
    return llm.handle.steps.recorder.replayed


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_what_a_session_writes_does_not_depend_on_it(both, sampling):
    written = []
    for llm in both:
        session = llm.session(seed=3)
        session.read(TEXT)
        written.append(session.generate(max_new_tokens=80, sampling=SAMPLINGS[sampling]).text)
        written.append(session.ask("And then?", max_new_tokens=40).text)
        session.read(TEXT)
        written.append(session.generate(max_new_tokens=40).text)
    assert written[:3] == written[3:]
    assert replayed(both[0]) > 60


def test_surprisal_is_the_same(both):
    stats = []
    for llm in both:
        session = llm.session(surprisal=True)
        session.read(TEXT)
        session.generate(max_new_tokens=60)
        session.read("x")
        stats.append(session.stats)
    assert stats[0].perplexity == pytest.approx(stats[1].perplexity, rel=1e-6)
    assert stats[0].tokens_written == stats[1].tokens_written
    assert replayed(both[0]) > 30


def test_forked_saved_and_restored_sessions_go_on(both, tmp_path):
    texts = []
    for number, llm in enumerate(both):
        session = llm.session()
        session.read(TEXT)
        session.generate(max_new_tokens=30)
        fork = session.fork()
        session.save(tmp_path / str(number))
        restored = llm.restore(tmp_path / str(number))
        texts.append([each.generate(max_new_tokens=30).text for each in (session, fork, restored)])
        assert texts[-1][0] == texts[-1][1] == texts[-1][2]
    assert texts[0] == texts[1]
    assert both[0].handle.steps.recorder.recorded == 3


@pytest.mark.parametrize("speculate", ["prompt-lookup", "lookahead"])
def test_speculation_goes_on_between_recorded_steps(both, speculate):
    texts = []
    for llm in both:
        session = llm.session()
        session.read(TEXT)
        texts.append(session.generate(max_new_tokens=60, speculate=speculate).text)
        texts.append(session.generate(max_new_tokens=30).text)
    assert texts[:2] == texts[2:]


def test_sessions_that_write_together_are_recorded_as_a_batch(both):
    texts = []
    for llm in both:
        sessions = []
        for number in range(3):
            sessions.append(llm.session(seed=number))
            sessions[-1].read(TEXT[7 * number :])
        drawn = Sampling(temperature=1.5, top_k=20)
        texts.append([g.text for g in llm.generate_together(sessions, 40, sampling=drawn)])
        logits = [next_logits(session) for session in sessions]
        texts.append([int(each.argmax()) for each in logits])
    assert texts[:2] == texts[2:]
    assert replayed(both[0]) >= 40 - TraceRecorder.eager_steps - 2
