"""The tiny models and the byte tokenizer are what the other tests take them for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import tiny


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_is_small_and_peaked_and_the_same_each_time(family: str) -> None:
    model, again = tiny.build(family, seed=3), tiny.build(family, seed=3)
    assert model.config.model_type == family
    assert sum(parameter.numel() for parameter in model.parameters()) < 100_000
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name

    ids = tiny.random_ids(2, 40)
    with torch.no_grad():
        logits = model(ids).logits
        other = tiny.build(family, seed=4)(ids).logits
        swapped = model(ids[:, [1, 0, *range(2, 40)]]).logits
    assert logits.shape == (2, 40, tiny.VOCAB)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    assert 0.3 < logits.std() < 3
    assert (logits - other).abs().max() > 0.1
    # The order of the first two tokens is far enough away to pass every local layer, and still shows.
    assert (logits - swapped)[:, -1].abs().max() > 1e-3


def test_building_leaves_the_random_state_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    tiny.build("llama", seed=7)
    assert torch.equal(torch.rand(3), expected)


def test_overrides_do_not_leak_into_the_next_model() -> None:
    tiny.build("gpt_neox", **tiny.YARN)  # its configuration completes the dictionary it is given
    assert tiny.build("llama").model.rotary_emb.rope_type == "default"
    assert set(tiny.YARN["rope_parameters"]) == {
        "rope_type",
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
    }


def test_left_padding_is_on_the_left() -> None:
    ids, mask = tiny.left_padded([3, 1])
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert ids[1, :2].tolist() == [0, 0]
    assert (ids[mask.bool()] >= 3).all()


@pytest.mark.parametrize("text", ["plain", "  two  spaces\n\ttab", "naïve — 日本 🙂", "\x00\x7f"])
def test_the_tokenizer_writes_bytes(text: str) -> None:
    tokenizer = tiny.byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_the_tokenizer_knows_its_special_tokens() -> None:
    tokenizer = tiny.byte_tokenizer(add_bos=True)
    assert len(tokenizer) == tiny.BYTE_VOCAB
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)
    assert tokenizer("ab")["input_ids"] == [256, 97, 98]
    assert tokenizer("ab", add_special_tokens=False)["input_ids"] == [97, 98]
    assert tokenizer.decode([256, 97, 257], skip_special_tokens=True) == "a"


def test_the_chat_template_wraps_each_turn() -> None:
    turns = [{"role": "user", "content": "hi"}]
    text = tiny.byte_tokenizer().apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<s>[user]\nhi</s>\n[assistant]\n"


def test_the_byte_llama_fits_its_tokenizer() -> None:
    model: Any
    model, tokenizer = tiny.byte_llama(add_bos=True)
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer("hello", return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert written.shape[1] <= 10
    assert isinstance(tokenizer.decode(written[0]), str)
