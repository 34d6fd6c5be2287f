"""Greedy answers: the same whether alone or together, with what is shared read once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from everlong.attention import FullAttention
from everlong.errors import InputError
from everlong.evaluation.asking import answers, evaluating
from everlong.evaluation.loss import surprisal
from everlong.llm import LLM
from tests import tiny

PROMPTS = ["Ask", "Another one:", "x", "A longer prompt than the rest of them", "Ask again"]
CONTEXT = "It was a dark night; the rain fell in torrents, except at occasional intervals."


def stock(model: Any, text: list[int], most: int) -> list[int]:
    """Greedy decoding without a cache, padding or sharing."""
    ids = list(text)
    with torch.no_grad():
        for _ in range(most):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(text) :]


def family(name: str) -> tuple[Any, Any]:
    special = {"vocab_size": tiny.BYTE_VOCAB, "max_position_embeddings": 256}
    return tiny.build(name, **special), tiny.byte_tokenizer(add_bos=True)


@pytest.mark.parametrize("context", ["", CONTEXT])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_neox"])
def test_each_prompt_gets_what_it_gets_alone_without_padding_or_cache(name: str, context: str) -> None:
    model, tokenizer = family(name)
    found = answers(model, tokenizer, PROMPTS, context=context, max_new_tokens=6, stop="\0\0")
    before = f"{context}\n\n" if context else ""
    for prompt, text in zip(PROMPTS, found, strict=True):
        ids = stock(model, [256, *(before + prompt).encode()], 6)
        ids = ids[: ids.index(257)] if 257 in ids else ids
        assert text == tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_a_context_for_each_prompt_and_small_batches_change_nothing() -> None:
    model, tokenizer = family("llama")
    contexts = ["", CONTEXT, "A", CONTEXT, ""]
    found = answers(model, tokenizer, PROMPTS, context=contexts, batch=2)
    assert found == [
        answers(model, tokenizer, [prompt], context=context)[0]
        for prompt, context in zip(PROMPTS, contexts, strict=True)
    ]
    assert len(set(found)) > 2
    assert answers(model, tokenizer, []) == []


def say(model: Any, text: bytes) -> None:
    """Let a tiny model write this text, whatever it reads: each byte follows from the one before."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        for i, byte in enumerate(text):
            model.model.embed_tokens.weight[text[i - 1] if i else ord(":"), i] = 1
            model.lm_head.weight[byte, i] = 1


def test_an_answer_ends_at_the_stop_that_follows_a_word() -> None:
    model, tokenizer = tiny.byte_llama(hidden_size=32)
    say(model, b"\n goat.")
    assert answers(model, tokenizer, ["pet:"], max_new_tokens=7) == ["goat."]
    assert answers(model, tokenizer, ["pet:"], max_new_tokens=7, stop="t") == ["goa"]
    assert answers(model, tokenizer, ["pet:"], max_new_tokens=4) == ["go"]
    say(model, b"cow\nbird")
    assert answers(model, tokenizer, ["pet:", "pets:"], max_new_tokens=7) == ["cow", "cow"]


def test_an_answer_ends_at_the_models_own_end_of_text() -> None:
    model, tokenizer = tiny.byte_llama(hidden_size=32)
    say(model, b"cow bird")
    with torch.no_grad():
        model.lm_head.weight[257, 3] = 2  # </s> where the blank would be
    assert answers(model, tokenizer, ["pet:"], max_new_tokens=7) == ["cow"]
    model.generation_config.eos_token_id = [ord("o")]
    assert answers(model, tokenizer, ["pet:"], max_new_tokens=7) == ["c"]


def test_dropout_is_off_meanwhile_and_the_mode_comes_back() -> None:
    model, tokenizer = tiny.byte_llama(attention_dropout=0.9)
    calm = answers(model, tokenizer, PROMPTS)
    model.train()
    model.model.norm.eval()
    assert answers(model, tokenizer, PROMPTS) == calm
    assert model.training and model.model.layers[0].training and not model.model.norm.training
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        assert not torch.is_grad_enabled() and not model.training
        raise RuntimeError("inside")
    assert model.training


def test_an_empty_prompt_and_a_wrong_number_of_contexts_are_refused() -> None:
    model, tokenizer = tiny.byte_llama()
    with pytest.raises(InputError, match="prompt 1 is empty"):
        answers(model, tokenizer, ["a", ""])
    with pytest.raises(InputError, match="1 contexts for 2 prompts"):
        answers(model, tokenizer, ["a", "b"], context=["c"])


# --- surprisal ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("before", ["", CONTEXT * 2])
def test_surprisal_is_that_of_one_forward(add_bos: bool, before: str) -> None:
    model = tiny.byte_llama(max_position_embeddings=1024)[0]
    text = "Call me Ishmael. Some years ago, never mind how long precisely. " * 5
    ids = torch.tensor([[256] * add_bos + list((before + text).encode())])
    with torch.no_grad():
        logs = model(ids).logits[0].log_softmax(-1)
    theirs = -logs[:-1].gather(1, ids[0, 1:, None])[:, 0]
    scored = len(text) - (not add_bos and not before)
    ours = surprisal(model, tiny.byte_tokenizer(add_bos), text, before=before)
    torch.testing.assert_close(ours, theirs[-scored:], atol=1e-4, rtol=0)


def test_a_text_with_nothing_to_score_is_refused() -> None:
    model, tokenizer = tiny.byte_llama()
    with pytest.raises(InputError, match="no token"):
        surprisal(model, tokenizer, "a")


@pytest.mark.parametrize("is_chat", [True, False])
@pytest.mark.parametrize("context", ["", "Orla keeps the bees. "])
def test_questions_are_asked_as_sessions_ask_them(is_chat: bool, context: str) -> None:
    model, tokenizer = tiny.byte_llama(seed=1, add_bos=not is_chat, max_position_embeddings=512)
    if not is_chat:
        tokenizer.chat_template = None
    questions = ["Who keeps the bees?", "Who?"]
    found = answers(model, tokenizer, questions, context=context, max_new_tokens=8, in_turns=True)
    plain = answers(model, tokenizer, [f"Question: {q}\nAnswer:" for q in questions], max_new_tokens=8)
    expected = []
    with LLM(model, tokenizer, "tiny", FullAttention()) as llm:
        for question in questions:
            session = llm.session()
            if context:
                session.read(context.rstrip())
            expected.append(session.ask(question, max_new_tokens=8, stop="\n").text.strip())
    assert found == expected and (found == plain or is_chat or context)
