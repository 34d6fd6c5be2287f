"""A tiny model that reads and writes bytes, attached."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from everlong.attention import FullAttention, LMInfinite, Policy, SelfExtend, StreamingLLM
from everlong.llm import LLM
from everlong.reading import Sampling, Session
from tests.tiny import byte_llama

WINDOW = 40
TEXT = "It is a truth universally acknowledged. Ünï çødé 🙂 and 中文! " * 6


POLICIES = {
    "lm-infinite": LMInfinite(sinks=4, window=WINDOW),
    "low ceiling": LMInfinite(sinks=4, window=WINDOW, ceiling=11),
    "streaming-llm": StreamingLLM(sinks=4, window=WINDOW),
    "top_k": LMInfinite(sinks=4, window=WINDOW, top_k=2, top_k_layers=1),
    "full": FullAttention(),
    "self-extend": SelfExtend(neighbours=WINDOW, group_size=3),
}
SAMPLINGS = {
    "greedy": Sampling(),
    "penalty": Sampling(repetition_penalty=1.3),
    "drawn": Sampling(temperature=1.0, top_k=5),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_llm(policy: Policy | None = None, *, add_bos: bool = False, chat: bool = True, **config: Any) -> LLM:
    model, tokenizer = byte_llama(add_bos=add_bos, **config)
    if not chat:
        tokenizer.chat_template = None
    return LLM(model, tokenizer, "tiny", policy or LMInfinite(sinks=4, window=WINDOW))


@pytest.fixture
def llm() -> Iterator[LLM]:
    with make_llm() as made:
        yield made


def ids_of(session: Session) -> list[int]:
    """All tokens on a session's tape: run, waiting and held."""
    tape = session._tape
    return [*tape.driver.recent, *tape.queue, *tape.text.fork().finish()]


def next_logits(session: Session) -> Tensor:
    """Logits of the token that would come next; the session stays as it is."""
    tape = session.fork()._tape
    tape.begin_writing()
    tape.run_all(7, logits=True)
    assert tape.driver.logits is not None
    return tape.driver.logits
