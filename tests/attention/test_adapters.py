"""PEFT's weight adapters under attention policies, beyond the window: one for all rows, and one per row."""

import pytest
import torch

import tests.tiny as tiny
from everlong.attention import FullAttention, LMInfinite, StreamCache, attach
from everlong.errors import UnsupportedModelError, UnsupportedUseError

peft = pytest.importorskip("peft")

POLICY = LMInfinite(window=24, sinks=3)
LORA = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj"], "init_lora_weights": False}


@pytest.fixture(scope="module")
def adapted():
    """A tiny Llama with two strong random adapters; 'one' is active."""
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny.build("llama"), peft.LoraConfig(**LORA), adapter_name="one")
    model.add_adapter("two", peft.LoraConfig(**LORA))
    return model.eval()


@torch.no_grad()
def hand_loop(model, ids, new):
    for _ in range(new):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    return ids


@torch.no_grad()
def test_everything_seen_equals_the_stock_adapted_model(adapted):
    ids = tiny.random_ids(2, 40)
    stock = adapted(ids).logits
    with attach(adapted, FullAttention()):
        torch.testing.assert_close(adapted(ids).logits, stock, atol=1e-4, rtol=0)
    assert torch.equal(adapted(ids).logits, stock)


@pytest.mark.parametrize("which", ["the PEFT model", "the base model"])
def test_attaching_to_the_peft_model_or_to_its_base_is_the_same(adapted, which):
    ids = tiny.random_ids(2, 40)
    with attach(adapted if which == "the PEFT model" else adapted.get_base_model(), POLICY):
        written = adapted.generate(input_ids=ids, max_new_tokens=15, do_sample=False)
        assert torch.equal(written, hand_loop(adapted, ids, 15))
        result = adapted(ids)
        assert isinstance(tiny.cache_of(result), StreamCache)
        with adapted.disable_adapter(), torch.no_grad():
            assert not torch.allclose(adapted(ids).logits, result.logits, atol=1e-2)
    if which == "the PEFT model":
        with attach(adapted, POLICY), pytest.raises(UnsupportedUseError, match="nest"):
            attach(adapted.get_base_model(), POLICY)


def test_two_rows_of_different_length_with_two_adapters_equal_each_alone(adapted):
    lengths, names = [45, 29], ["one", "two"]
    ids, mask = tiny.left_padded(lengths)
    with attach(adapted, POLICY):
        batch = adapted.generate(
            input_ids=ids, attention_mask=mask, adapter_names=names, max_new_tokens=15, do_sample=False
        )
        swapped = adapted.generate(
            input_ids=ids, attention_mask=mask, adapter_names=names[::-1], max_new_tokens=15, do_sample=False
        )
        for row, (length, name) in enumerate(zip(lengths, names, strict=True)):
            adapted.set_adapter(name)
            alone = hand_loop(adapted, ids[row : row + 1, -length:], 15)
            assert torch.equal(batch[row : row + 1, -length - 15 :], alone)
            assert not torch.equal(swapped[row : row + 1, -length - 15 :], alone)
    adapted.set_adapter("one")


@torch.no_grad()
def test_a_cache_with_an_adapter_per_row_goes_on_chunk_by_chunk(adapted):
    lengths, names = [45, 29], ["one", "two"]
    ids, mask = tiny.left_padded(lengths)
    with attach(adapted, POLICY) as handle:
        cache = handle.new_cache()
        for begin, stop in ((0, 10), (10, 33), (33, 34), (34, 45)):
            logits = adapted(
                input_ids=ids[:, begin:stop],
                attention_mask=mask[:, :stop],
                **tiny.cached(cache),
                adapter_names=names,
            ).logits
        for row, (length, name) in enumerate(zip(lengths, names, strict=True)):
            adapted.set_adapter(name)
            alone = adapted(ids[row : row + 1, -length:], use_cache=False).logits
            torch.testing.assert_close(logits[row, -1], alone[0, -1], atol=1e-4, rtol=0)
    adapted.set_adapter("one")


def test_an_adapter_learns_under_a_policy(adapted):
    ids = tiny.random_ids(2, 40)
    with attach(adapted, POLICY):
        adapted.train()
        loss = torch.nn.functional.cross_entropy(
            adapted(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        )
        loss.backward()
        adapted.eval()
    gradients = [p.grad for name, p in adapted.named_parameters() if "lora_" in name and ".one." in name]
    assert gradients and all(gradient.abs().max() > 0 for gradient in gradients)
    adapted.zero_grad()


@torch.no_grad()
def test_an_adapter_added_while_attached_is_followed():
    base, ids = tiny.build("llama"), tiny.random_ids(1, 40)
    with attach(base, POLICY):
        plain = base(ids).logits
        torch.manual_seed(0)
        model = peft.get_peft_model(base, peft.LoraConfig(**LORA)).eval()
        changed = model(ids).logits
        assert not torch.allclose(changed, plain, atol=1e-2)
    with attach(model, POLICY):
        assert torch.equal(model(ids).logits, changed)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_prompt_learning_adapters_are_refused(kind):
    config = {
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    }[kind]
    model = peft.get_peft_model(tiny.build("llama"), config)
    with pytest.raises(UnsupportedModelError, match=r"adapter 'default'.*LoRA"):
        attach(model, POLICY)


def test_a_prefix_that_reaches_an_attached_base_model_is_refused():
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(tiny.build("llama"), config).eval()
    with attach(model.get_base_model(), POLICY), pytest.raises(UnsupportedUseError, match="DynamicCache"):
        model(tiny.random_ids(1, 9))
