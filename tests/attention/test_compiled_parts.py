"""A written token that sees several parts, by compiled kernels: one softmax, as by PyTorch's kernels."""

import pytest
import torch

import tests.tiny as tiny
from everlong.attention import InfLLM, Recall, attach, compiled_parts, parts
from everlong.attention.parts import Part, attend
from everlong.errors import StateError
from everlong.kernels import loading
from everlong.kernels.direct import attend_parts
from everlong.kernels.team import has_team

pytestmark = pytest.mark.skipif(not (loading.wanted() and has_team()), reason="there are no kernels here")

POLICIES = {
    "recall": Recall(window=40, sinks=3, recalled=16, block=4),
    "recall, always asked": Recall(window=40, sinks=3, recalled=16, block=4, steps=1),
    "inf-llm": InfLLM(window=40, sinks=3, recalled=16, block=4, representatives=2),
}


@pytest.fixture
def taken(counted, monkeypatch):
    """The number of parts, each time that the kernels attend; they are taken for few keys, too."""
    monkeypatch.setattr(compiled_parts, "_LEAST", 0)
    return counted("attend_parts")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_parts(sizes, rows=1, heads=(6, 2), d=16):
    made = []
    for number, size in enumerate(sizes):
        keys, values = (randn(rows, heads[1], size + 7, d, seed=2 * number + x)[:, :, :size] for x in (1, 2))
        made.append(Part(randn(rows, heads[0], 1, d, seed=99 + number) * 2, keys, values))
    return made


def one_softmax(some, scaling):
    logits, values = [], []
    for part in some:
        groups = part.queries.shape[1] // part.keys.shape[1]
        keys = part.keys.double().repeat_interleave(groups, 1)
        logits.append(part.queries.double() @ keys.mT * scaling)
        values.append(part.values.double().repeat_interleave(groups, 1))
    return torch.cat(logits, -1).softmax(-1) @ torch.cat(values, 2)


@pytest.mark.parametrize("sizes", [(1, 1), (128, 5), (300, 129, 2), (1, 700, 256)])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (4, 1)])
def test_parts_are_one_softmax(heads, rows, sizes, taken):
    some = some_parts(sizes, rows, heads)
    found = attend(some, scaling=0.3)
    torch.testing.assert_close(found.double(), one_softmax(some, 0.3), atol=1e-5, rtol=1e-5)
    assert taken == [len(sizes)]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi"])
def test_what_is_written_is_what_pytorchs_kernels_give(family, policy, rows, taken, monkeypatch):
    model, ids, found = tiny.build(family), tiny.random_ids(rows, 30, seed=1), []
    for takes in (True, False):
        with monkeypatch.context() as context, attach(model, POLICIES[policy]) as handle, torch.no_grad():
            if not takes:
                context.setattr(parts, "wanted", lambda: False)
            cache, before = handle.new_cache(), len(taken)
            model(tiny.random_ids(rows, 90), **tiny.cached(cache))
            written = [model(ids[:, at : at + 1], **tiny.cached(cache)).logits for at in range(30)]
            found.append(torch.cat(written, 1))
            assert (len(taken) > before) == takes
    torch.testing.assert_close(*found, atol=1e-5 * float(found[1].abs().max()), rtol=0)


def test_what_they_do_not_take_is_pytorchs(taken):
    some = some_parts((30, 40))
    attend(some, scaling=0.3, softcap=5.0)
    attend(some, scaling=0.3, sink_logits=torch.zeros(6))
    attend(
        [*some, Part(some[0].queries, some[0].keys, some[0].values, torch.ones(1, 1, 1, 30) > 0)], scaling=0.3
    )
    attend([Part(randn(1, 6, 2, 16), part.keys, part.values) for part in some], scaling=0.3)
    attend(
        [Part(part.queries.double(), part.keys.double(), part.values.double()) for part in some], scaling=0.3
    )
    some[1].keys.requires_grad_()
    attend(some, scaling=0.3).sum().backward()
    assert some[1].keys.grad is not None and taken == []
    with torch.no_grad():
        attend(some, scaling=0.3)
    assert taken == [2]
    with pytest.raises(StateError, match="attend_parts does not take"):
        attend_parts([(randn(1, 6, 1, 16), randn(1, 2, 4, 16), randn(1, 2, 4, 8))], 0.3)


def test_few_keys_are_left_to_pytorch(taken, monkeypatch):
    monkeypatch.setattr(compiled_parts, "_LEAST", 2 * 16 * 200)
    attend(some_parts((99, 100)), scaling=0.3)
    assert taken == []
    attend(some_parts((100, 100)), scaling=0.3)
    assert taken == [2]


def test_kernels_that_are_wrong_are_left_with_a_warning(taken, monkeypatch):
    monkeypatch.setattr(compiled_parts, "attend_parts", lambda some, scaling: torch.zeros(2, 6, 1, 20))
    monkeypatch.setattr(compiled_parts, "_is_right", compiled_parts._is_right.__wrapped__)
    some = some_parts((200, 300))
    with pytest.warns(UserWarning, match="attend wrongly"):
        found = attend(some, scaling=0.3)
    torch.testing.assert_close(found.double(), one_softmax(some, 0.3), atol=1e-5, rtol=1e-5)
    assert taken == []


def test_they_are_held_against_plain_operations_under_autocast_too(taken, monkeypatch):
    monkeypatch.setattr(compiled_parts, "_is_right", compiled_parts._is_right.__wrapped__)
    some = some_parts((200, 300))
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(some, scaling=0.3)
    torch.testing.assert_close(found.double(), one_softmax(some, 0.3), atol=1e-5, rtol=1e-5)
    assert taken == [2]


def test_they_follow_neither_the_default_dtype_nor_device(taken, monkeypatch):
    monkeypatch.setattr(compiled_parts, "_is_right", compiled_parts._is_right.__wrapped__)
    some = some_parts((200, 300))
    expected = one_softmax(some, 0.3)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = attend(some, scaling=0.3)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    assert found.dtype == torch.float32 and taken == [2]
