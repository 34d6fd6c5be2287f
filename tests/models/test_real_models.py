"""The catalogue's models themselves, as they come out of a pull."""

import pytest
import torch

from everlong.models.catalogue import CATALOGUE
from everlong.models.files import sha256_of
from everlong.models.loading import load_model
from everlong.models.store import Store

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def smollm2():
    return load_model("smollm2-135m", device="cpu")


@pytest.fixture(scope="module")
def gemma():
    if not Store().terms_accepted("gemma-3-270m"):
        pytest.skip("the Gemma terms were not accepted on this machine (everlong pull gemma-3-270m)")
    return load_model("gemma-3-270m", device="cpu")


def continuation(loaded, text, count):
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids
    written = loaded.model.generate(ids, max_new_tokens=count, do_sample=False)
    return loaded.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_gguf_is_kept_and_is_the_catalogues(smollm2):
    assert sha256_of(Store().gguf_path("smollm2-135m")) == CATALOGUE["smollm2-135m"].sha256
    assert Store().state("smollm2-135m").state == "ready"


def test_smollm2_is_converted_to_the_same_weights_everywhere(smollm2):
    assert smollm2.weights_hash == "8e861e6c7303d9dbad682e361ce38a17f33567035c2951ba4d46e59af474ec5f"


def test_smollm2_knows_its_length_its_ends_and_its_template(smollm2):
    assert smollm2.model.config.max_position_embeddings == CATALOGUE["smollm2-135m"].context
    assert smollm2.tokenizer.eos_token == "<|im_end|>"
    asked = smollm2.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert asked.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert smollm2.tokenizer(asked).input_ids[0] == smollm2.tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_smollm2_takes_digits_alone(smollm2):
    assert smollm2.tokenizer.tokenize("at  12") == ["at", "ĠĠ", "1", "2"]


def test_smollm2_writes_sense(smollm2):
    assert continuation(smollm2, "The capital of France is", 8).startswith(" Paris")


def test_gemma_begins_with_bos_and_splits_as_it_was_trained(gemma):
    ids = gemma.tokenizer("Hello world, 12  naïve").input_ids
    assert ids[:3] == [gemma.tokenizer.bos_token_id, 9259, 1902]
    assert gemma.tokenizer.decode(ids, skip_special_tokens=True) == "Hello world, 12  naïve"
    assert CATALOGUE["gemma-3-270m"].bos


def test_gemma_is_converted_to_the_same_weights_everywhere(gemma):
    assert gemma.weights_hash == "6f12d06f6bb7e173055d3613026ec042ef602b7aba5c015094bf84073dedb986"


def test_gemma_uses_its_context(gemma):
    text = "The code of the red door is 4711. The code of the blue door is 2603. The code of the red door is"
    assert continuation(gemma, text, 5).strip().startswith("4711")


@torch.no_grad()
def test_gemma_needs_its_bos(gemma):
    with_bos = gemma.tokenizer(
        "It is a truth universally acknowledged, that a single man", return_tensors="pt"
    )
    losses = [gemma.model(ids, labels=ids).loss for ids in (with_bos.input_ids, with_bos.input_ids[:, 1:])]
    assert losses[0] < losses[1]
