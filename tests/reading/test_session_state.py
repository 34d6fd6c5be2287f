"""A saved session goes on bit by bit, and what cannot be trusted is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from everlong.attention import (
    DualChunk,
    FullAttention,
    LMInfinite,
    NTKScaling,
    Policy,
    SelfExtend,
    StreamingLLM,
    YaRN,
)
from everlong.errors import InputError, StateError
from everlong.llm import LLM
from everlong.reading import Sampling, Session, Stats
from everlong.reading import state as state_module
from tests.reading.conftest import TEXT, WINDOW, ids_of, make_llm, next_logits

DRAWN = Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.2)


def run_on(session: Session) -> list[int]:
    """Read, ask, draw and chat on."""
    session.read("and so on, " * 9)
    session.generate(6, sampling=DRAWN)
    session.chat("Why?", max_new_tokens=5, sampling=DRAWN)
    session.read(TEXT)
    session.generate(6, sampling=DRAWN)
    return ids_of(session)


def without_bytes(session: Session) -> Stats:
    return dataclasses.replace(session.stats, bytes={})


@pytest.mark.parametrize("tokens", [0, 1, 30, WINDOW, 250, 401])
@pytest.mark.parametrize(
    "policy",
    [
        LMInfinite(sinks=4, window=WINDOW),
        LMInfinite(sinks=4, window=WINDOW, top_k=3, top_k_layers=1),
        StreamingLLM(sinks=4, window=WINDOW),
        FullAttention(),
        SelfExtend(neighbours=WINDOW, group_size=3),
        DualChunk(chunk=WINDOW, positions=2 * WINDOW),
        NTKScaling(),
        YaRN(),
    ],
)
def test_a_restored_session_goes_on_bit_by_bit(policy: Policy, tokens: int, tmp_path: Path) -> None:
    with make_llm(policy) as llm:
        llm.handle.steps.stop()  # or else it is another token that is the first to be recorded
        session = llm.session(seed=1, system="Be brief.")
        if tokens:
            session.read("".join(chr(97 + i % 7) for i in range(tokens)))
        session.generate(3, sampling=DRAWN)
        session.save(tmp_path / "session")
        restored = llm.restore(tmp_path / "session")
        assert without_bytes(restored) == without_bytes(session)  # growing buffers have room to spare
        assert restored.policy == session.policy
        assert torch.equal(next_logits(restored), next_logits(session))
        assert run_on(restored) == run_on(session)
        assert torch.equal(next_logits(restored), next_logits(session))
        assert torch.equal(restored._tape.generator.get_state(), session._tape.generator.get_state())


def test_where_steps_are_recorded_a_restored_session_goes_on_to_rounding(tmp_path: Path) -> None:
    with make_llm() as llm:
        session = llm.session(seed=1)
        session.read(TEXT)
        session.generate(30, sampling=DRAWN)
        session.save(tmp_path / "session")
        restored = llm.restore(tmp_path / "session")
        assert run_on(restored) == run_on(session)
        expected = next_logits(session)
        torch.testing.assert_close(
            next_logits(restored), expected, atol=1e-5 * float(expected.abs().max()), rtol=0
        )


def test_another_load_of_the_same_weights_goes_on_with_it(tmp_path: Path) -> None:
    with make_llm() as llm:
        session = llm.session(seed=1)
        session.read(TEXT)
        session.save(tmp_path / "session")
        expected = run_on(session)
    with make_llm(FullAttention()) as other:
        restored = other.restore(tmp_path / "session")
        assert run_on(restored) == expected


def test_everything_that_was_begun_is_saved(llm: LLM, tmp_path: Path) -> None:
    session = llm.session(
        LMInfinite(sinks=6, window=48), system="Be brief.", chunk=20, surprisal=True, seed=9
    )
    session.pin("be kind")
    session.read(TEXT + "é")
    session.save(tmp_path / "session")
    restored = llm.restore(tmp_path / "session")
    assert restored.policy == session.policy and without_bytes(restored) == without_bytes(session)
    assert restored._tape.text.tail == session._tape.text.tail != ""
    for each in (session, restored):
        each.reset()
        each.read("a")
    assert ids_of(restored) == ids_of(session) and restored.policy == session.policy
    assert (restored.chunk, restored._seed, restored._surprisal) == (20, 9, True)


def test_the_file_does_not_grow_with_what_was_read(llm: LLM, tmp_path: Path) -> None:
    sizes = []
    session = llm.session()
    for _ in range(3):
        session.read("x" * 5000)
        session.save(tmp_path / "session")
        sizes.append((tmp_path / "session").stat().st_size)
    assert max(sizes) - min(sizes) < 100


@pytest.fixture
def saved(llm: LLM, tmp_path: Path) -> Path:
    session = llm.session()
    session.read(TEXT)
    session.save(tmp_path / "session")
    return tmp_path / "session"


def test_a_file_cut_short_anywhere_is_refused(llm: LLM, saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    cut = tmp_path / "cut"
    for length in [0, 1, 7, 8, 9, *range(10, len(content), 997), len(content) - 1]:
        cut.write_bytes(content[:length])
        with pytest.raises(InputError, match="cut is cut short"):
            llm.restore(cut)


@pytest.mark.parametrize("content", [b"PNG" * 100, b"{}" * 100, b"\0" * 100])
def test_something_else_is_refused(llm: LLM, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "else"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a state file"):
        llm.restore(path)
    with pytest.raises(InputError, match="no state file"):
        llm.restore(tmp_path / "missing")
    with pytest.raises(InputError, match="no state file"):
        llm.restore(tmp_path)
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="not the state of a session"):
        llm.restore(path)


def rewritten(path: Path, change: Any) -> None:
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["everlong"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(header, tensors)
    save_file(tensors, path, metadata={"everlong": json.dumps(header)})


def test_an_unknown_format_is_refused(llm: LLM, saved: Path) -> None:
    rewritten(saved, lambda header, tensors: header.update(format=99))
    with pytest.raises(StateError, match="format 99.*reads 3"):
        llm.restore(saved)


def test_a_file_with_something_missing_is_refused_whatever_it_is(llm: LLM, saved: Path) -> None:
    content = saved.read_bytes()
    with safe_open(saved, "pt") as file:
        header = json.loads(file.metadata()["everlong"])
        names = [name for name in file.keys() if name != "logits"]  # noqa: SIM118
    assert len(names) > 5
    changes: list[Any] = [lambda header, tensors, name=name: tensors.pop(name) for name in names]
    for place in ([], ["session"], ["session", "tape"], ["session", "options"], ["session", "tape", "cache"]):
        inner = header
        for key in place:
            inner = inner[key]

        def drop(header: Any, tensors: Any, place: list[str], name: str) -> None:
            for key in place:
                header = header[key]
            del header[name]

        changes += [lambda h, t, place=place, name=name: drop(h, t, place, name) for name in inner]
    for change in changes:
        saved.write_bytes(content)
        rewritten(saved, change)
        with pytest.raises((StateError, InputError)):
            llm.restore(saved)


def test_the_state_of_other_weights_is_refused(llm: LLM, saved: Path) -> None:
    with make_llm(seed=1) as other, pytest.raises(StateError, match="other weights"):
        other.restore(saved)
    with torch.no_grad():
        llm.model.lm_head.weight[0, 0] += 1
    with pytest.raises(StateError, match="tiny.*other weights.*load the model"):
        llm.restore(saved)


def test_the_state_of_another_tokenizer_or_template_is_refused(saved: Path) -> None:
    with make_llm(chat=False) as other, pytest.raises(StateError, match="another tokenizer or chat template"):
        other.restore(saved)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    llm: LLM, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()
    session = llm.session()
    session.read("b")

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_module, "save_file", full)
    with pytest.raises(StateError, match="No space left.*nothing was changed"):
        session.save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_folder_that_is_not_there_is_named(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot write .*missing"):
        llm.session().save(tmp_path / "missing" / "session")
