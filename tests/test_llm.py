"""The façade: load, attach, sessions, and everything given back at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from everlong.attention import FullAttention, LMInfinite, Recall, StreamingLLM
from everlong.errors import ConfigurationError, UnknownNameError, UnsupportedUseError
from everlong.llm import load
from everlong.models.packing import Weights
from tests.tiny import byte_llama, random_ids


def test_by_default_a_model_recalls_beyond_its_training_length() -> None:
    model, tokenizer = byte_llama()
    with load(model, tokenizer=tokenizer) as llm:
        assert llm.attention == Recall(window=64, recalled=16, block=16, distance=31, lead=4)
        assert llm.handle.training_length == 64
        assert llm.model is model and llm.tokenizer is tokenizer
        assert llm.session().policy == llm.attention
        assert "Recall" in repr(llm) and "Recall" in repr(llm.session())
        ids = random_ids(1, 64)
        with torch.inference_mode():
            followed = model(input_ids=ids).logits
    with torch.inference_mode():
        torch.testing.assert_close(followed, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_a_policy_may_be_given_by_name() -> None:
    model, tokenizer = byte_llama()
    with load(model, "streaming-llm", tokenizer=tokenizer) as llm:
        assert llm.attention == StreamingLLM(window=64)
        assert llm.session("full").policy == FullAttention()
        assert llm.session(LMInfinite(window=20)).policy.span == 20
        with pytest.raises(UnknownNameError, match="streaming-llm"):
            llm.session("streaming-lm")
        with pytest.raises(ConfigurationError, match="neither a policy"):
            llm.session(3)  # type: ignore[arg-type]


def test_closing_gives_the_model_back() -> None:
    model, tokenizer = byte_llama()
    ids = random_ids(1, 100)
    before = model(input_ids=ids).logits
    with load(model, LMInfinite(window=20), tokenizer=tokenizer) as llm:
        assert not torch.equal(model(input_ids=ids).logits, before)
        with pytest.raises(UnsupportedUseError, match="attached already"):
            load(model, tokenizer=tokenizer)
    assert torch.equal(model(input_ids=ids).logits, before)
    llm.close()
    with load(model, FullAttention(), tokenizer=tokenizer):
        pass


def test_a_model_that_cannot_be_used_is_given_back_too() -> None:
    model, tokenizer = byte_llama()
    model.train()
    with pytest.raises(ConfigurationError, match=r"model\.eval"):
        load(model, tokenizer=tokenizer)
    model.eval()
    load(model, tokenizer=tokenizer).close()


def test_a_loaded_model_needs_its_tokenizer() -> None:
    model, _ = byte_llama()
    with pytest.raises(ConfigurationError, match="tokenizer"):
        load(model)


def test_a_folder_is_loaded_and_its_sessions_are_restored(tmp_path: Path) -> None:
    model, tokenizer = byte_llama()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with load(tmp_path / "model", device="cpu") as llm:
        assert llm.name == "model"
        session = llm.session()
        session.read("It is a truth universally acknowledged")
        session.save(tmp_path / "session")
        expected = session.generate(5).text
    with load(str(tmp_path / "model"), device="cpu") as llm:
        assert llm.restore(tmp_path / "session").generate(5).text == expected


@pytest.mark.model
@pytest.mark.parametrize(("weights", "margin"), [("float", 1e-3), ("auto", 0.5)])  # packed ones round
def test_the_default_model_reads_answers_and_writes(weights: Weights, margin: float) -> None:
    with load("smollm2-135m", device="cpu", weights=weights) as llm:
        session = llm.session(surprisal=True)
        report = session.read("The capital of France is Paris. The capital of Italy is Rome. " * 4)
        assert report.perplexity is None or report.perplexity < 50
        answer = session.ask("What is the capital of Italy?", max_new_tokens=20, keep=True)
        ids = torch.tensor([list(session._tape.driver.recent)])
        with torch.inference_mode():
            logits = llm.model(input_ids=ids, use_cache=False).logits[0]
        logits, written = logits[-1 - answer.tokens : -1], ids[0, -answer.tokens :]
        behind = logits.amax(-1) - logits.gather(1, written[:, None])[:, 0]
        assert answer.text and behind.max() <= margin
        messages = [{"role": "user", "content": "Hello"}]
        chat = llm.session()
        chat.chat("Hello", max_new_tokens=1)
        whole = llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert list(chat._tape.driver.recent) == whole
