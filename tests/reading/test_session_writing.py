"""Writing: what stock generate() writes, stopped where asked, drawn as seeded, on a fork or kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from everlong.attention import FullAttention, LMInfinite, StreamCache
from everlong.errors import ConfigurationError, InputError, NumericalError
from everlong.llm import LLM
from everlong.reading import Generation, Sampling, Session
from tests.reading.conftest import TEXT, WINDOW, ids_of, make_llm, next_logits
from tests.tiny import byte_llama, random_ids

DRAWN = Sampling(temperature=1.0)


@pytest.fixture
def session(llm: LLM) -> Session:
    made = llm.session(seed=0)
    made.read(TEXT)
    return made


def end_with(session: Session, token: int) -> None:
    """Make this token the one that ends a text."""
    session.model.__dict__["end_tokens"] = frozenset({token})


def test_greedy_writing_is_that_of_stock_generate() -> None:
    stock, _ = byte_llama(eos_token_id=None)
    ids = random_ids(1, 20)
    expected = stock.generate(input_ids=ids, max_new_tokens=15, do_sample=False, eos_token_id=None)
    with make_llm(eos_token_id=None) as llm:
        session = llm.session()
        session.read(ids)
        end_with(session, -1)
        session.generate(15)
        assert ids_of(session) == expected[0].tolist()


def test_writing_beyond_the_window_is_that_of_generate_under_attach(llm: LLM) -> None:
    ids = random_ids(1, 3 * WINDOW)
    expected = llm.model.generate(input_ids=ids, max_new_tokens=20, do_sample=False, eos_token_id=None)
    session = llm.session()
    session.read(ids)
    end_with(session, -1)
    assert session.generate(20).tokens == 20
    assert ids_of(session) == expected[0].tolist()


def test_writing_in_parts_is_writing_at_once(session: Session) -> None:
    other = session.fork()
    session.generate(12)
    for count in (1, 5, 6):
        other.generate(count)
    assert ids_of(other) == ids_of(session)


def test_the_text_is_that_of_the_tokens(llm: LLM, session: Session) -> None:
    before = len(ids_of(session))
    fork = session.fork()
    pieces = list(fork.stream(40))
    generation = session.generate(40)
    written = ids_of(session)[before:]
    assert generation.text == str(generation) == "".join(pieces) == llm.tokenizer.decode(written)
    assert (generation.tokens, generation.stop_reason) == (40, "length")
    assert generation.stats.tokens_written == 40
    assert generation.seconds > 0


def test_a_stream_ends_with_its_report(session: Session) -> None:
    stream = session.stream(3)
    texts = []
    with pytest.raises(StopIteration) as end:
        while True:
            texts.append(next(stream))
    assert isinstance(end.value.value, Generation) and end.value.value.text == "".join(texts)


def test_a_stream_left_early_keeps_what_was_written(session: Session) -> None:
    reference = session.fork()
    for _ in session.stream(40):
        if session.stats.tokens_written >= 10:
            break
    written = session.stats.tokens_written
    assert written < 40
    session.generate(20 - written)
    reference.generate(20)
    assert ids_of(session) == ids_of(reference)


def test_the_end_token_ends_the_text_and_is_no_part_of_it(session: Session) -> None:
    fork = session.fork()
    fork.generate(12)
    written = ids_of(fork)[-12:]
    last = next(i for i, token in enumerate(written) if token not in written[:i] and i > 3)
    end_with(session, written[last])
    before = ids_of(session)
    generation = session.generate(12)
    assert (generation.tokens, generation.stop_reason) == (last, "eos")
    assert ids_of(session) == before + written[:last]
    assert session.generate(5).tokens == 0


def test_the_model_knows_where_its_turn_ends() -> None:
    with make_llm(eos_token_id=[5, 6]) as llm:
        assert llm.session().model.end_tokens == {5, 6, 257}


def test_a_stop_string_ends_the_text(llm: LLM) -> None:
    letters = torch.full((llm.model.config.vocab_size,), -torch.inf)
    letters[ord("a") : ord("e") + 1] = 0
    llm.model.lm_head.register_forward_hook(lambda module, args, output: output + letters)
    session = llm.session(seed=0)
    session.read(TEXT)
    whole = session.fork().generate(60, sampling=DRAWN).text
    stop = whole[30:33]
    expected = whole[: whole.index(stop)]
    generation = session.generate(60, sampling=DRAWN, stop=["zz", stop])
    assert (generation.text, generation.stop_reason) == (expected, "stop")
    assert generation.tokens == len(expected) + 3
    assert session.generate(10, stop="zz").stop_reason == "length"


def test_drawing_is_reproducible_by_seed(llm: LLM) -> None:
    def written(seed: int | None, sampling: Sampling) -> list[int]:
        session = llm.session(seed=seed)
        session.read(TEXT)
        session.generate(12, sampling=sampling)
        return ids_of(session)

    assert written(1, DRAWN) == written(1, DRAWN) != written(2, DRAWN)
    assert written(None, DRAWN) != written(None, DRAWN)
    seeded = Sampling(temperature=1.0, seed=4)
    assert written(None, seeded) == written(1, seeded) != written(1, DRAWN)


def test_the_repetition_penalty_looks_back_over_reading_and_writing(llm: LLM) -> None:
    session = llm.session()
    session.read([1, 2, 3])
    likeliest = int(next_logits(session).argmax())
    session.read([likeliest, *range(10, 40)])
    likeliest = int(next_logits(session).argmax())
    session = llm.session()
    session.read([likeliest] * 3)
    strong = Sampling(repetition_penalty=1e6)
    session.generate(30, sampling=strong)
    written = ids_of(session)[3:]
    assert len(set(written) | {likeliest}) == 31, "nothing occurs twice"
    short = llm.session()
    short.read([likeliest] * 3)
    short.generate(60, sampling=Sampling(repetition_penalty=1e6, repetition_window=1))
    assert len(set(ids_of(short))) < 61


def test_penalties_that_look_back_work_after_restoring_too(llm: LLM, tmp_path: Any) -> None:
    session = llm.session()
    session.read(list(range(50)))
    session.save(tmp_path / "s")
    restored = llm.restore(tmp_path / "s")
    strong = Sampling(repetition_penalty=50.0)
    for each in (session, restored):
        each.generate(20, sampling=strong)
    assert ids_of(restored) == ids_of(session)


# --- questions and forks ----------------------------------------------------------------------------


def test_a_question_leaves_the_session_as_it_is(session: Session) -> None:
    before, logits, stats = ids_of(session), next_logits(session), session.stats
    first = session.ask("Who?", max_new_tokens=8)
    assert session.ask("Who?", max_new_tokens=8).text == first.text
    assert ids_of(session) == before and session.stats == stats
    assert torch.equal(next_logits(session), logits)
    kept = session.ask("Who?", keep=True, max_new_tokens=8)
    assert kept.text == first.text
    assert len(ids_of(session)) > len(before)
    assert kept.stats == session.stats


def test_chat_keeps_and_streams_answers(session: Session) -> None:
    fork = session.fork()
    answer = fork.chat("Who?", max_new_tokens=8)
    assert "".join(session.stream_answer("Who?", keep=True, max_new_tokens=8)) == answer.text
    assert ids_of(fork) == ids_of(session)


def test_a_fork_is_independent(session: Session) -> None:
    fork = session.fork()
    before = ids_of(session)
    fork.read("something else entirely " * 10)
    fork.generate(5, sampling=DRAWN)
    assert ids_of(session) == before
    again = session.fork()
    session.read("something else entirely " * 10)
    session.generate(5, sampling=DRAWN)
    assert ids_of(session) == ids_of(fork)
    assert ids_of(again) == before


def test_without_a_seed_each_fork_draws_something_new(llm: LLM) -> None:
    session = llm.session()
    session.read(TEXT)
    answers = {session.ask("Who?", max_new_tokens=12, sampling=DRAWN).text for _ in range(4)}
    assert len(answers) > 1
    seeded = llm.session(seed=1)
    seeded.read(TEXT)
    assert len({seeded.ask("Who?", max_new_tokens=12, sampling=DRAWN).text for _ in range(4)}) == 1


def test_an_answer_of_a_model_without_a_template_ends_with_its_paragraph() -> None:
    with make_llm(chat=False) as llm:
        assert llm.session()._tape.form.stop == ("\nQuestion:", "\n\n")


# --- refusals ---------------------------------------------------------------------------------------


def test_a_prompt_of_zero_tokens_is_refused_unless_there_is_a_start_token(llm: LLM) -> None:
    session = llm.session()
    with pytest.raises(InputError, match="zero tokens"):
        session.generate(1)
    session.read("still usable")
    assert llm.session(system="Be brief.").generate(1).tokens <= 1
    with make_llm(add_bos=True) as other:
        beginning = other.session()
        beginning.generate(2)
        assert ids_of(beginning)[0] == 256


@pytest.mark.parametrize("count", [0, -1, 1.5, True, None])
def test_a_number_of_tokens_that_cannot_work_is_refused(session: Session, count: Any) -> None:
    for call in (session.generate, session.stream, lambda n: session.ask("Who?", max_new_tokens=n)):
        with pytest.raises(ConfigurationError, match="max_new_tokens"):
            call(count)


@pytest.mark.parametrize(
    ("options", "message"), [({"chunk": 0}, "chunk"), ({"system": ""}, "system"), ({"seed": "x"}, "seed")]
)
def test_options_that_cannot_work_are_refused(llm: LLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.session(**options)


def test_an_empty_question_is_refused(session: Session) -> None:
    for call in (session.ask, session.chat):
        with pytest.raises(InputError, match="empty"):
            call("")


def test_logits_that_are_not_finite_are_an_error(llm: LLM, session: Session) -> None:
    with torch.no_grad():
        llm.model.lm_head.weight[5] = torch.nan
    for sampling in (Sampling(), DRAWN):
        with pytest.raises(NumericalError, match="not finite"):
            session.generate(1, sampling=sampling)


# --- what policies are told -------------------------------------------------------------------------


@dataclass(frozen=True)
class Listening(LMInfinite):
    """Notes what it is told."""

    needs_surprisal: ClassVar[bool] = True
    notes: list[Any] = field(default_factory=list, compare=False)

    def after_forward(self, cache: StreamCache, tokens: Tensor, surprisal: Tensor | None) -> None:
        assert surprisal is not None and surprisal.shape == tokens.shape and surprisal.dtype == torch.float32
        self.notes.append((tokens[0].tolist(), surprisal[0].tolist()))

    def end_of_prefill(self, cache: StreamCache) -> None:
        self.notes.append("end")


@pytest.fixture
def notes() -> Iterator[list[Any]]:
    yield []


def test_a_policy_that_needs_surprisal_is_told_it_in_reading_and_writing(notes: list[Any]) -> None:
    stock, _ = byte_llama()
    ids = random_ids(1, 20)
    with make_llm() as llm:
        session = llm.session(Listening(sinks=4, window=WINDOW, notes=notes), chunk=8)
        session.read(ids)
        session.generate(4)
        whole = torch.tensor([ids_of(session)[:-1]])
    told = [note for note in notes if note != "end"]
    assert [len(tokens) for tokens, _ in told] == [8, 8, 4, 1, 1, 1]
    assert [token for tokens, _ in told for token in tokens] == whole[0].tolist()
    logits = stock(input_ids=whole).logits[0].log_softmax(-1)
    expected = -logits[:-1].gather(-1, whole[0, 1:, None])[:, 0]
    given = torch.tensor([nats for _, each in told for nats in each])
    assert given[0] == 0
    torch.testing.assert_close(given[1:], expected.detach(), atol=1e-4, rtol=1e-4)


def test_a_policy_is_told_once_each_time_that_reading_is_over(notes: list[Any]) -> None:
    with make_llm() as llm:
        session = llm.session(Listening(sinks=4, window=WINDOW, notes=notes))
        for _ in range(2):
            session.read([1, 2, 3])
            session.generate(3)
            session.generate(3)
        assert notes.count("end") == 2


def test_a_session_may_follow_a_policy_of_its_own(llm: LLM) -> None:
    short, full = llm.session(), llm.session(FullAttention())
    for each in (short, full):
        each.read(TEXT)
    assert full.stats.forgotten == 0 and short.stats.forgotten > 0
