"""Several adapters as one: held against weights with the deltas added, and against PEFT."""

import dataclasses

import peft
import pytest
import torch

import tests.tiny as tiny
from everlong.errors import ConfigurationError, InputError
from everlong.memory.combine import combine
from everlong.memory.compatible import lora_problems
from tests.memory.adapters import IDS, logits_with, logits_with_deltas, lora


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def is_plain(adapter):
    return not lora_problems(
        adapter.config.to_dict(), {name: tuple(t.shape) for name, t in adapter.tensors.items()}
    )


CASES = {
    "two of one rank": ([lora(1), lora(2)], [1.0, 1.0], 16),
    "weights and scalings": (
        [lora(3, use_rslora=True, lora_alpha=4), lora(2, r=16, lora_alpha=8), lora(1, lora_alpha=16)],
        [2.0, -1.0, 0.5],
        32,
    ),
    "different modules": ([lora(1, ["q_proj"]), lora(2, ["q_proj", "down_proj"])], [1.0, 0.7], 16),
    "modules that never meet": ([lora(1, ["q_proj"], r=16), lora(2, ["v_proj"])], [1.0, 1.0], 16),
    "different layers": ([lora(1, ["q_proj"], layers_to_transform=[0]), lora(2, ["v_proj"])], [1.0, 1.0], 8),
    "a pattern": ([lora(1, r".*layers\.1\..*(q|k)_proj"), lora(2)], [1.0, 1.0], 16),
    "one": ([lora(1, lora_alpha=3)], [0.5], 8),
}


@pytest.mark.parametrize("adapters, weights, rank", CASES.values(), ids=CASES)
def test_the_effect_is_the_weighted_sum_of_the_effects(adapters, weights, rank):
    combination = combine(adapters, weights)
    assert combination.rank == rank and combination.method == "cat" and combination.error == 0.0
    assert is_plain(combination.adapter)
    combined = logits_with(combination.adapter)
    close(combined, logits_with_deltas(adapters, weights))
    assert not torch.allclose(combined, logits_with_deltas(adapters[:-1], weights[:-1]), atol=1e-2)


def test_it_is_what_peft_makes_by_cat_with_zeros_up_to_the_next_rank():
    adapters, weights = [lora(1), lora(2, r=16, lora_alpha=4)], [0.5, 2.0]
    model = peft.get_peft_model(tiny.build("llama"), adapters[0].config, adapter_name="one")
    model.add_adapter("two", adapters[1].config)
    for name, adapter in zip(("one", "two"), adapters, strict=True):
        peft.set_peft_model_state_dict(model, dict(adapter.tensors), name)
    model.add_weighted_adapter(["one", "two"], weights, "both", combination_type="cat")
    theirs = peft.get_peft_model_state_dict(model, adapter_name="both")
    ours = combine(adapters, weights)
    assert ours.rank == 32 and set(ours.adapter.tensors) == set(theirs)
    for key, tensor in ours.adapter.tensors.items():
        kept, zeros = tensor.split((24, 8), 0 if ".lora_A." in key else 1)
        torch.testing.assert_close(kept, theirs[key])
        assert not zeros.any()


def test_above_the_largest_rank_nothing_is_lost_that_has_no_weight():
    # 128 + 64 ranks on layers of width 32: the product has rank 32 at most.
    adapters = [lora(1, r=128), lora(2, r=64)]
    combination = combine(adapters)
    assert combination.method == "svd" and combination.rank == 128 and combination.error < 1e-6
    close(logits_with(combination.adapter), logits_with_deltas(adapters, [1.0, 1.0]))


def test_above_the_largest_rank_the_error_is_that_of_the_best_approximation():
    generator = torch.Generator().manual_seed(0)

    def wide(r):
        adapter = lora(r=r)
        tensors = {
            f"base_model.model.{module}.{part}.weight": torch.randn(shape, generator=generator)
            for module in ("layers.0.q_proj", "layers.1.q_proj")
            for part, shape in (("lora_A", (r, 300)), ("lora_B", (200, r)))
        }
        return dataclasses.replace(adapter, tensors=tensors)

    def product(adapter, module):
        lower, upper = (adapter.tensors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        return upper.double() @ lower.double() * adapter.config.lora_alpha / adapter.config.r

    first, second = wide(128), wide(32)
    only = {name: tensor for name, tensor in second.tensors.items() if "layers.0" in name}
    second = dataclasses.replace(second, tensors=only)
    combination = combine([first, second], [1.0, 0.5])
    assert combination.rank == 128 and combination.method == "svd"
    whole = product(first, "layers.0.q_proj") + 0.5 * product(second, "layers.0.q_proj")
    untouched = product(first, "layers.1.q_proj")
    lost = torch.linalg.matrix_norm(whole - product(combination.adapter, "layers.0.q_proj"))
    best = torch.linalg.svdvals(whole)[128:].square().sum().sqrt()
    torch.testing.assert_close(lost, best, rtol=1e-4, atol=0)
    close(product(combination.adapter, "layers.1.q_proj"), untouched)
    total = (whole.square().sum() + untouched.square().sum()).sqrt()
    assert combination.error == pytest.approx(float(best / total), rel=1e-4) and combination.error > 0.01


def test_half_precision_is_folded_in_single():
    adapter = lora(1, lora_alpha=3)
    halved = dataclasses.replace(
        adapter, tensors={name: tensor.bfloat16() for name, tensor in adapter.tensors.items()}
    )
    combination = combine([halved, halved])
    assert all(tensor.dtype == torch.float32 for tensor in combination.adapter.tensors.values())
    close(logits_with(combination.adapter), logits_with_deltas([halved, halved], [1.0, 1.0]))


@pytest.mark.parametrize("weights", [[1.0], [1.0, float("nan")]])
def test_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(ConfigurationError, match="weights"):
        combine([lora(1), lora(2)], weights)


def test_adapters_of_differently_shaped_models_are_refused():
    other = lora(2)
    stretched = {name: torch.cat([t, t], 1) if ".lora_A." in name else t for name, t in other.tensors.items()}
    with pytest.raises(InputError, match=r"do not belong to one base model.*q_proj"):
        combine([lora(1), dataclasses.replace(other, tensors=stretched)])


def test_what_is_not_plain_lora_is_refused():
    with pytest.raises(InputError, match="use_dora"):
        combine([lora(1), lora(2, use_dora=True)])


def test_the_logits_differ_from_the_bases():
    with torch.no_grad():
        assert not torch.allclose(logits_with(lora(1)), tiny.build("llama")(IDS).logits, atol=1e-2)
