"""What a watched model is seen to change in, and what is no change."""

import pytest
import torch
from torch import nn

import tests.tiny as tiny
from everlong.models.packing import by_float_weights, pack
from everlong.models.watch import ModelWatch

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def _bias(model):
    layer = model.model.layers[0].mlp.up_proj
    layer._parameters["bias"] = nn.Parameter(torch.zeros(layer.out_features))


def _swap_hooks(model):
    hook = model.model.norm.register_forward_hook(lambda *_: None)
    hook.remove()
    model.model.norm.register_forward_hook(lambda *_: None)


CHANGES = {
    "a parameter": lambda m: setattr(m.model.norm, "weight", nn.Parameter(m.model.norm.weight.detach() * 2)),
    "a bias where there was none": _bias,
    "the first module of a container": lambda m: m.model.extra.__setitem__("a", nn.Linear(2, 2)),
    "a module": lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.GELU()),
    "a layer less": lambda m: m.model.layers.__delitem__(1),
    "a class": lambda m: setattr(m.model.norm, "__class__", type("Norm", (type(m.model.norm),), {})),
    "a forward": lambda m: setattr(m.model.norm, "forward", lambda x: x),
    "a hook": lambda m: m.model.layers[1].mlp.register_forward_hook(lambda *_: None),
    "a hook before": lambda m: m.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda *_: None),
    "another hook": _swap_hooks,
    "training": lambda m: m.train(),
    "training of a part": lambda m: m.model.layers[0].self_attn.train(),
    "packed weights": lambda m: pack(m, "int8"),
}


@pytest.fixture
def model():
    made = tiny.build("llama", **WIDE)
    made.model.extra = nn.ModuleDict()
    return made


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_and_the_next_look_sees_none(model, change):
    watch = ModelWatch(model, lambda hook: False)
    first = watch.state()
    assert first is not None and watch.state() == first
    CHANGES[change](model)
    second = watch.state()
    assert second != first
    assert watch.state() == second


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_packed_weights_are_watched_too(model, weights):
    packing = pack(model, weights)
    watch = ModelWatch(model, lambda hook: False)
    states = [watch.state()]
    with by_float_weights(model):
        states.append(watch.state())
    states.append(watch.state())
    packing.undo()
    states.append(watch.state())
    assert None not in states and len(set(states)) == 4


def test_what_happens_to_other_models_is_no_change(model):
    watch, other = ModelWatch(model, lambda hook: False), tiny.build("llama", **WIDE)
    first = watch.state()
    other.model.norm.register_forward_hook(lambda *_: None)
    with by_float_weights(other):
        pack(other, "int8")
        assert watch.state() == first
    model.model.norm.note = "an attribute that no code of the model reads"
    assert watch.state() == first
    model.model.norm.forward = lambda x: x
    assert watch.state() != first


def test_a_forward_that_is_taken_away_is_a_change(model):
    model.model.norm.forward = type(model.model.norm).forward.__get__(model.model.norm)
    watch = ModelWatch(model, lambda hook: False)
    first = watch.state()
    del model.model.norm.forward
    model.model.norm.note = "as many attributes as before"
    assert watch.state() != first


def test_tensors_that_move_are_a_change_where_they_are_to_lie_still(model):
    watch = ModelWatch(model, lambda hook: False)
    first = watch.state(lying_still=False)
    model.model.norm.weight.data = model.model.norm.weight.data.clone()
    assert watch.state(lying_still=False) == first
    assert watch.state(lying_still=True) != first
