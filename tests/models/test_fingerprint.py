import copy

import torch
from torch import nn

from everlong.models.fingerprint import SAMPLES, weights_hash
from tests import tiny


def test_the_same_weights_have_the_same_hash_and_other_weights_another():
    assert weights_hash(tiny.build("llama", seed=1)) == weights_hash(tiny.build("llama", seed=1))
    assert weights_hash(tiny.build("llama", seed=1)) != weights_hash(tiny.build("llama", seed=2))


def test_type_shape_and_name_count():
    linear = nn.Linear(4, 6, bias=False)
    other_shape = nn.Linear(6, 4, bias=False)
    other_shape.weight = nn.Parameter(linear.weight.detach().reshape(4, 6))
    other_name = nn.Module()
    other_name.register_parameter("kernel", linear.weight)
    variants = [linear, other_shape, other_name, copy.deepcopy(linear).to(torch.bfloat16)]
    assert len({weights_hash(module) for module in variants}) == 4


def test_a_step_of_training_changes_it():
    model = tiny.build("llama")
    before = weights_hash(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1 + 1e-6)
    assert weights_hash(model) != before


def test_first_and_last_value_of_a_large_tensor_are_read():
    for index in (0, -1):
        module = nn.Linear(SAMPLES, 3, bias=False)
        before = weights_hash(module)
        with torch.no_grad():
            module.weight.view(-1)[index] += 1
        assert weights_hash(module) != before


def test_tables_that_are_not_saved_do_not_count():
    module = nn.Linear(2, 2)
    before = weights_hash(module)
    module.register_buffer("table", torch.ones(3), persistent=False)
    assert weights_hash(module) == before


def test_scalars_empty_and_meta_tensors_are_taken():
    module = nn.Module()
    module.register_buffer("scale", torch.tensor(2.0))
    module.register_buffer("nothing", torch.empty(0, 3))
    module.register_buffer("elsewhere", torch.empty(5, device="meta"))
    assert len(weights_hash(module)) == 64
