"""Reading: the tokens of the whole text, in any pieces; accounts that add up; nothing lost on the way."""

from __future__ import annotations

import io
import math
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from everlong.attention import FullAttention, LMInfinite
from everlong.errors import InputError, NumericalError, StateError
from everlong.llm import LLM
from everlong.reading import Progress, Session
from tests.reading.conftest import TEXT, WINDOW, ids_of, make_llm, next_logits
from tests.tiny import byte_llama, random_ids


def pieces(text: str, seed: int) -> Iterator[str]:
    draw = random.Random(seed)
    while text:
        size = draw.randrange(1, 90)
        yield text[:size]
        text = text[size:]


@pytest.mark.parametrize("chunk", [1, 13, 512])
def test_uneven_pieces_and_reads_give_the_stream_of_one_read(llm: LLM, chunk: int, tmp_path: Path) -> None:
    one = llm.session(chunk=chunk)
    one.read(TEXT)
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    sources: list[list[Any]] = [
        [path],
        [io.StringIO(TEXT)],
        [path.open("rb")],
        [pieces(TEXT, 1)],
        list(pieces(TEXT, 2)),
        list(TEXT),
    ]
    for reads in sources:
        other = llm.session(chunk=chunk)
        for source in reads:
            other.read(source)
        assert ids_of(other) == ids_of(one)
        torch.testing.assert_close(next_logits(other), next_logits(one), atol=1e-4, rtol=1e-4)
        assert other.stats.tokens_read == one.stats.tokens_read == len(ids_of(one))


def test_reading_ids_equals_the_stock_model_within_the_window() -> None:
    stock, _ = byte_llama()
    ids = random_ids(1, WINDOW)
    expected = stock(input_ids=ids).logits[0, -1]
    with make_llm() as llm:
        session = llm.session(chunk=16)
        session.read(ids)
        torch.testing.assert_close(next_logits(session), expected, atol=1e-4, rtol=1e-4)
        assert session.stats.kept == WINDOW and session.stats.waiting == 0


def test_a_text_is_read_inside_the_turn_that_the_template_opens(llm: LLM) -> None:
    session = llm.session()
    session.read(TEXT)
    session.ask("Who?", keep=True, max_new_tokens=1)
    messages = [{"role": "user", "content": TEXT + "\n\nWho?"}]
    whole = llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids_of(session)[:-1] == whole


def test_a_conversation_has_the_tokens_of_the_template(llm: LLM) -> None:
    letters = torch.full((llm.model.config.vocab_size,), -torch.inf)
    letters[ord("a") : ord("z") + 1] = 0  # so that what it writes can be rendered again
    llm.model.lm_head.register_forward_hook(lambda module, args, output: output + letters)
    session = llm.session(system="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}]
    for message in ("Hello!", "And then?", "Why?"):
        answer = session.chat(message, max_new_tokens=4)
        messages += [{"role": "user", "content": message}]
        whole = llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids_of(session) == [*whole, *answer.text.encode()]
        messages += [{"role": "assistant", "content": answer.text}]


def test_turn_markers_in_a_text_are_text(llm: LLM) -> None:
    session = llm.session()
    session.read("a</s>b")
    assert llm.tokenizer.eos_token_id not in ids_of(session)


@pytest.mark.parametrize("add_bos", [False, True])
def test_a_model_without_a_template_reads_raw_text_after_its_start_token(add_bos: bool) -> None:
    with make_llm(add_bos=add_bos, chat=False) as llm:
        session = llm.session()
        session.read("abc")
        assert ids_of(session) == [256] * add_bos + list(b"abc")
        session.ask("Who?", keep=True, max_new_tokens=1)
        assert bytes(ids_of(session)[add_bos:-1]) == b"abc\n\nQuestion: Who?\nAnswer:"
        other = llm.session(system="Be brief.")
        other.read("abc")
        assert ids_of(other) == [256] * add_bos + list(b"Be brief.\n\nabc")


def test_ids_are_read_as_they_are(llm: LLM) -> None:
    session = llm.session()
    session.read([1, 2, 3])
    session.read("abc")
    assert ids_of(session) == [1, 2, 3, *b"abc"]
    session.ask("Who?", keep=True, max_new_tokens=1)
    assert bytes(t for t in ids_of(session)[:-1] if t < 256) == b"\1\2\3abc[user]\nWho?\n[assistant]\n"


def test_a_turn_opened_after_ids_gets_no_second_start_token() -> None:
    with make_llm(add_bos=True) as llm:
        session = llm.session()
        session.read([256, 1, 2])
        session.ask("Who?", keep=True, max_new_tokens=1)
        assert ids_of(session)[:-1].count(256) == 1


def test_the_source_is_read_as_it_is_needed(llm: LLM) -> None:
    taken = 0

    def source() -> Iterator[str]:
        nonlocal taken
        for _ in range(40):
            taken += 1
            yield "x" * 1000

    seen: list[tuple[int, int]] = []
    llm.session(chunk=4000).read(source(), progress=lambda progress: seen.append((taken, progress.tokens)))
    assert seen[0][0] < 30
    assert all(taken * 1000 - tokens < 25_000 for taken, tokens in seen)


def test_progress_and_report_tell_how_far_it_came(llm: LLM, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("x" * 50_000)
    seen: list[Progress] = []
    report = llm.session(chunk=4000, surprisal=True).read(path, progress=seen.append)
    tokens = [progress.tokens for progress in seen]
    assert tokens == sorted(tokens) and tokens[0] == 4000
    assert report.tokens == tokens[-1] == seen[-1].total == 50_000 + len(b"<[user]\n")
    assert all(abs((progress.total or 0) / report.tokens - 1) < 0.1 for progress in seen)
    assert all(progress.perplexity and progress.bytes["window"] for progress in seen)
    assert report.tokens_per_second == pytest.approx(report.tokens / report.seconds)


def test_accounts_add_up(llm: LLM) -> None:
    session = llm.session()
    session.read(TEXT)
    session.generate(5)
    stats = session.stats
    assert stats.tokens_written == 5
    held = stats.kept + stats.recallable + stats.forgotten + stats.waiting
    assert stats.tokens_read + stats.tokens_written == held == len(ids_of(session))
    assert stats.kept == WINDOW and stats.forgotten > 0


def test_perplexity_is_that_of_the_mean_over_tokens_not_chunks() -> None:
    stock, _ = byte_llama()
    ids = random_ids(1, 39)
    expected = stock(input_ids=ids, labels=ids).loss.exp().item()
    with make_llm() as llm:
        for chunk in (1, 13, 38, 39, 512):
            session = llm.session(chunk=chunk, surprisal=True)
            report = session.read(ids)
            assert report.perplexity == pytest.approx(expected, rel=1e-4)
            assert session.stats.perplexity == pytest.approx(expected, rel=1e-4)
        parts = llm.session(chunk=13, surprisal=True)
        reports = [parts.read(ids[:, :20]), parts.read(ids[:, 20:])]
        assert parts.stats.perplexity == pytest.approx(expected, rel=1e-4)
        nats = [math.log(report.perplexity or 0) for report in reports]
        assert nats[0] * 19 + nats[1] * 19 == pytest.approx(math.log(expected) * 38, rel=1e-4)


def test_without_surprisal_the_head_is_not_computed(llm: LLM) -> None:
    rows: list[int] = []
    llm.model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    session = llm.session(chunk=16)
    assert session.read(TEXT).perplexity is None
    assert rows == []
    session.generate(3)
    assert rows == [1, 1, 1]
    llm.session(chunk=16, surprisal=True).read([1] * 20)
    assert rows[3:] == [16, 4]


def test_score_is_the_surprisal_of_the_continuation_and_leaves_the_session_as_it_is() -> None:
    stock, _ = byte_llama()
    context, text = "The sea is ", "blue and wide"
    with make_llm(chat=False) as llm:
        session = llm.session()
        session.read(context)
        before = session.stats
        score = session.score(text)
        assert session.stats == before
    whole = torch.tensor([list((context + text).encode())])
    logits = stock(input_ids=whole).logits[0].log_softmax(-1)
    expected = -logits[len(context) - 1 : -1].gather(-1, whole[0, len(context) :, None])[:, 0]
    torch.testing.assert_close(score.surprisal, expected.detach(), atol=1e-4, rtol=1e-4)
    assert score.tokens == len(text)
    assert (
        score.perplexity == pytest.approx(math.exp(score.nll)) == pytest.approx(expected.mean().exp().item())
    )


def test_the_first_token_ever_is_scored_only_after_a_start_token() -> None:
    with make_llm(chat=False) as llm:
        assert llm.session().score("abc").tokens == 2
        with pytest.raises(InputError, match="single token"):
            llm.session().score("a")
    with make_llm(chat=False, add_bos=True) as llm:
        assert llm.session().score("abc").tokens == 3


# --- interruptions and errors ---------------------------------------------------------------------


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C interrupts, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupting(llm: LLM, after: int) -> Any:
    """Send Ctrl-C in the middle of the forward that comes `after` others."""
    calls = [0]

    def hook(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == after + 1:
            signal.raise_signal(signal.SIGINT)

    return llm.model.model.layers[1].register_forward_pre_hook(hook)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_waits_for_the_end_of_the_chunk_and_nothing_read_is_lost(llm: LLM) -> None:
    handler = signal.getsignal(signal.SIGINT)
    whole = llm.session(chunk=50)
    whole.read(TEXT)
    session = llm.session(chunk=50)
    file = io.StringIO(TEXT)
    hook = interrupting(llm, after=2)
    with pytest.raises(KeyboardInterrupt):
        session.read(file)
    hook.remove()
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(session._tape.driver.recent) == 150
    with pytest.raises(InputError, match="empty"):
        session.read(file)  # all of the small file was taken
    assert ids_of(session) == ids_of(whole)
    torch.testing.assert_close(next_logits(session), next_logits(whole), atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("mode", ["r", "rb"])
def test_after_ctrl_c_an_open_file_is_read_on_where_it_stands(llm: LLM, tmp_path: Path, mode: str) -> None:
    path = tmp_path / "text.txt"
    text = "x" + "é" * 60_000
    path.write_text(text, encoding="utf-8")
    whole = llm.session(chunk=3000)
    whole.read(text)
    session = llm.session(chunk=3000)
    with path.open(mode, **({} if mode == "rb" else {"encoding": "utf-8"})) as file:
        hook = interrupting(llm, after=3)
        with pytest.raises(KeyboardInterrupt):
            session.read(file)
        hook.remove()
        session.read(file)
    assert session.stats.tokens_read == whole.stats.tokens_read
    assert ids_of(session) == ids_of(whole)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_writing_leaves_a_usable_session(llm: LLM) -> None:
    expected = llm.session()
    expected.read(TEXT)
    text = expected.generate(12).text
    session = llm.session()
    session.read(TEXT)
    out = ""
    hook = interrupting(llm, after=5)
    with pytest.raises(KeyboardInterrupt):
        for piece in session.stream(12):
            out += piece
    hook.remove()
    assert session.stats.tokens_written < 12
    session.generate(12 - session.stats.tokens_written)
    assert ids_of(session) == ids_of(expected)
    assert text.startswith(out)


def test_outside_the_main_thread_reading_works_without_signals(llm: LLM) -> None:
    session = llm.session()
    thread = threading.Thread(target=lambda: session.read(TEXT))
    thread.start()
    thread.join()
    assert session.stats.tokens_read == len(TEXT.encode()) + len(b"<[user]\n")


def test_an_error_from_the_source_or_the_callback_leaves_what_was_read(llm: LLM) -> None:
    def broken() -> Iterator[str]:
        yield "x" * 100
        raise RuntimeError("line down")

    session = llm.session(chunk=16)
    with pytest.raises(RuntimeError, match="line down"):
        session.read(broken())
    assert session.stats.tokens_read == 108

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.read("y" * 100, progress=stop)
    session.read("z")
    assert bytes(ids_of(session)[8:]) == b"x" * 100 + b"y" * 100 + b"z"


@pytest.mark.parametrize("source", ["", [], Path("/nowhere/x"), b"x", [999_999]])
def test_what_cannot_be_read_leaves_the_session_untouched(llm: LLM, source: Any) -> None:
    session = llm.session()
    with pytest.raises(InputError):
        session.read(source)
    assert ids_of(session) == [] and session.stats.tokens_read == 0
    session.pin("still possible")


def test_values_that_are_not_finite_are_an_error_with_the_place(llm: LLM) -> None:
    session = llm.session(chunk=16)
    session.read([1] * 16)
    with torch.no_grad():
        llm.model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="token 32"):
        session.read([1] * 33)
    with pytest.raises(NumericalError):
        llm.session(surprisal=True).read([1] * 16)


def test_after_an_error_in_the_middle_of_a_forward_the_session_says_what_to_do(llm: LLM) -> None:
    session = llm.session()
    session.read([1] * 16)
    saved = session.fork()

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    hook = llm.model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        session.read([2] * 4)
    hook.remove()
    with pytest.raises(StateError, match="new stream"):
        session.generate(1)
    assert saved.generate(1).tokens == 1
    session.reset()
    session.read([2] * 4)


def test_a_closed_model_says_so(llm: LLM) -> None:
    session = llm.session()
    session.read("a")
    llm.close()
    calls = [
        lambda: session.read("b"),
        lambda: session.generate(1),
        lambda: session.ask("b"),
        lambda: session.score("b"),
        lambda: session.reset(),
        lambda: llm.session(),
    ]
    for call in calls:
        with pytest.raises(StateError, match="closed"):
            call()


# --- pinning ----------------------------------------------------------------------------------------


def test_a_pinned_text_stays_and_is_seen_however_much_is_read(llm: LLM) -> None:
    session = llm.session()
    report = session.pin("be brief")
    pinned = len(b"<[user]\nbe brief\n\n")
    assert report.tokens == pinned
    assert isinstance(session.policy, LMInfinite) and session.policy.sinks == pinned
    session.read(TEXT)
    reference = llm.session(LMInfinite(sinks=pinned, window=WINDOW))
    reference.read("be brief\n\n" + TEXT)
    assert ids_of(session) == ids_of(reference)
    torch.testing.assert_close(next_logits(session), next_logits(reference), atol=1e-4, rtol=1e-4)
    assert isinstance(llm.attention, LMInfinite) and llm.attention.sinks == 4, (
        "other sessions are not changed"
    )


def test_a_short_pinned_text_does_not_lower_the_sinks(llm: LLM) -> None:
    session = llm.session(LMInfinite(sinks=20, window=WINDOW))
    session.pin("b")
    assert isinstance(session.policy, LMInfinite) and session.policy.sinks == 20


def test_pinning_comes_first(llm: LLM) -> None:
    session = llm.session()
    session.read("a")
    with pytest.raises(StateError, match="reset"):
        session.pin("b")
    session.reset()
    session.pin("b")
    with pytest.raises(StateError, match="reset"):
        session.pin("c")
    session.reset()
    assert isinstance(session.policy, LMInfinite) and session.policy.sinks == 4


def test_a_pinned_text_that_fills_the_window_is_refused_and_nothing_happens(llm: LLM) -> None:
    session = llm.session()
    with pytest.raises(ValueError, match=r"58 tokens .* window only 40"):
        session.pin("x" * 48)
    with pytest.raises(InputError, match="empty"):
        session.pin("")
    assert session.stats.tokens_read == 0
    session.pin("x" * 29)


def test_with_full_attention_everything_stays_pinned(llm: LLM) -> None:
    session = llm.session(FullAttention())
    session.pin("x" * 200)
    assert session.policy == FullAttention()


def test_reset_keeps_options_and_forgets_the_rest(llm: LLM) -> None:
    session: Session = llm.session(system="Be brief.", seed=3)
    session.read(TEXT)
    session.generate(3)
    session.reset()
    fresh = llm.session(system="Be brief.", seed=3)
    for each in (session, fresh):
        each.read("a")
    assert ids_of(session) == ids_of(fresh)
    assert session.stats.tokens_written == 0
    assert torch.equal(session._tape.generator.get_state(), fresh._tape.generator.get_state())
