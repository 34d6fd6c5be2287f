"""Many queries and several parts by compiled kernels: one softmax, as in double precision."""

import pytest
import torch

import tests.tiny as tiny
from everlong.attention import LMInfinite, Recall, SnapKV, attach, compiled_parts, parts
from everlong.attention.parts import Part, attend
from everlong.errors import StateError
from everlong.kernels import loading
from everlong.kernels.blocks import Triangle, attend_blocks
from everlong.kernels.team import has_team

pytestmark = pytest.mark.skipif(not (loading.wanted() and has_team()), reason="there are no kernels here")

POLICIES = {
    "lm-infinite": LMInfinite(window=40, sinks=3),
    "lm-infinite, a low ceiling": LMInfinite(window=40, sinks=3, ceiling=20),
    "recall": Recall(window=40, sinks=3, recalled=16, block=4),
    "snap-kv": SnapKV(budget=40, observed=8),
}


@pytest.fixture
def taken(counted, monkeypatch):
    """The number of parts, each time that the kernels attend; they are taken for few products, too."""
    monkeypatch.setattr(compiled_parts, "_LEAST_PRODUCTS", 0)
    monkeypatch.setattr(compiled_parts, "_FEWEST", 2)
    return counted("attend_blocks")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mask(rows, heads, n, m, seed=0):
    """Return a mask that hides all keys from some queries."""
    seen = randn(rows, heads, n, m, seed=seed) > 0.3
    seen[..., ::3, :] = False
    return seen


def seen_of(part):
    """Return which query sees which key, (…, n, m)."""
    n, m = part.queries.shape[2], part.keys.shape[2]
    if isinstance(part.visible, Triangle):
        seen = torch.ones(n, m, dtype=torch.bool)
        return seen.tril() if part.visible is Triangle.LOWER else seen.triu()
    return torch.ones(n, m, dtype=torch.bool) if part.visible is None else part.visible


def one_softmax(some, scaling):
    logits, values = [], []
    for part in some:
        groups = part.queries.shape[1] // part.keys.shape[1]
        products = part.queries.double() @ part.keys.double().repeat_interleave(groups, 1).mT * scaling
        logits.append(products.masked_fill(~seen_of(part), -torch.inf))
        values.append(part.values.double().repeat_interleave(groups, 1))
    return torch.cat(logits, -1).softmax(-1) @ torch.cat(values, 2)


def some_parts(n, sizes, rows=1, heads=(6, 2), d=16):
    """Return parts whose keys each query sees all, or as a triangle or mask among the sizes says."""
    made = []
    for number, size in enumerate(sizes):
        m, visible = (n, size) if isinstance(size, Triangle) else (size, None)
        if not isinstance(size, int | Triangle):
            visible = size
            m = size.shape[-1]
        keys, values = (randn(rows, heads[1], m + 7, d, seed=2 * number + x)[:, :, :m] for x in (1, 2))
        if number % 2:  # as products leave them, the heads of a token behind one another
            keys, values = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (keys, values))
        queries = 2 * randn(rows, n + 5, heads[0], d, seed=99 + number).transpose(1, 2)[:, :, 2 : n + 2]
        made.append(Part(queries, keys, values, visible))
    return made


@pytest.mark.parametrize("n", [2, 64, 65, 200])
@pytest.mark.parametrize(
    "sizes",
    [
        (Triangle.LOWER,),
        (Triangle.LOWER, 300, Triangle.UPPER, 3),
        (1, Triangle.UPPER, 128),
        (129, Triangle.LOWER, 700),
    ],
    ids=["causal", "a window", "leaving", "more"],
)
@pytest.mark.parametrize(
    ("rows", "heads", "d"), [(1, (6, 2), 16), (2, (4, 4), 20), (1, (4, 1), 80), (1, (3, 1), 64)]
)
def test_parts_are_one_softmax(n, sizes, rows, heads, d, threads, taken):
    some = some_parts(n, sizes, rows, heads, d)
    found = attend(some, scaling=0.3)
    torch.testing.assert_close(found.double(), one_softmax(some, 0.3), atol=2e-5, rtol=1e-5)
    assert taken == [len(sizes)]


@pytest.mark.parametrize("d", [16, 64])
@pytest.mark.parametrize("n", [2, 70, 130])
@pytest.mark.parametrize("shape", [(1, 1, True), (2, 1, True), (1, 6, True), (2, 6, True), (2, 1, False)])
def test_masks_hide_keys_of_rows_heads_and_queries(n, shape, d, threads, taken):
    rows, heads, of_queries = shape
    masks = [mask(rows, heads, n if of_queries else 1, m, seed=m) for m in (5, 150)]
    some = some_parts(n, [masks[0], Triangle.LOWER, masks[1]], rows=2, d=d)
    found = attend(some, scaling=0.3)
    torch.testing.assert_close(found.double(), one_softmax(some, 0.3), atol=2e-5, rtol=1e-5)
    assert taken == [3]


def test_what_a_query_does_not_see_leaves_no_trace(taken):
    """Neither where it is seen by no query of a block, nor where its logit would be the largest by far."""
    n, hidden = 100, torch.zeros(1, 1, 100, 130, dtype=torch.bool)
    some = some_parts(n, [hidden, Triangle.LOWER])
    some[0] = Part(some[0].queries, 1e3 * some[0].keys, 1e6 * some[0].values, hidden)
    alone = attend(some[1:], scaling=0.3)
    for order in (some, some[::-1]):
        torch.testing.assert_close(attend(order, scaling=0.3), alone, atol=1e-6, rtol=1e-6)


def test_a_query_that_is_no_number_sees_none_and_no_other_does(taken):
    some = some_parts(70, (Triangle.LOWER, 200))
    some[0].queries[:, 1, 5] = torch.nan
    found = attend(some, scaling=0.3).isnan()
    expected = torch.zeros_like(found)
    expected[:, 1, 5] = True
    assert torch.equal(found, expected) and taken


def test_large_logits_are_no_trouble(taken):
    some = [Part(30 * p.queries, p.keys, p.values, p.visible) for p in some_parts(70, (Triangle.LOWER, 200))]
    found = attend(some, scaling=1.0)
    torch.testing.assert_close(found.double(), one_softmax(some, 1.0), atol=1e-3, rtol=1e-3)


def test_the_same_query_sees_the_same_in_any_number_of_threads(taken):
    some, found = some_parts(200, (Triangle.LOWER, 300)), []
    before = torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(attend(some, scaling=0.3))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi"])
def test_what_is_read_is_what_pytorchs_kernels_give(family, policy, rows, taken, monkeypatch):
    model, ids, found = tiny.build(family), tiny.random_ids(rows, 150), []
    for takes in (True, False):
        with monkeypatch.context() as context, attach(model, POLICIES[policy]) as handle, torch.no_grad():
            if not takes:
                context.setattr(parts, "wanted", lambda: False)
            cache, before = handle.new_cache(), len(taken)
            read = [model(piece, **tiny.cached(cache)).logits for piece in ids.split(50, 1)]
            found.append(torch.cat(read, 1))
            assert (len(taken) > before) == takes
    torch.testing.assert_close(*found, atol=2e-5 * float(found[1].abs().max()), rtol=0)


def test_padded_rows_are_read_as_by_pytorchs_kernels(taken, monkeypatch):
    model, ids, found = tiny.build("llama"), tiny.random_ids(3, 120), []
    mask = torch.ones(3, 120, dtype=torch.long)
    mask[0, :70] = mask[1, :3] = 0
    for takes in (True, False):
        with attach(model, LMInfinite(window=40, sinks=3)) as handle, torch.no_grad():
            if not takes:
                monkeypatch.setattr(parts, "wanted", lambda: False)
            before = len(taken)
            read = model(ids, attention_mask=mask, **tiny.cached(handle.new_cache())).logits
            found.append(read[mask.bool()])
            assert (len(taken) > before) == takes
    torch.testing.assert_close(*found, atol=2e-5 * float(found[1].abs().max()), rtol=0)


def test_keys_that_are_many_rows_in_one_place_are_read_there(taken):
    some = some_parts(70, (Triangle.LOWER, 130), heads=(6, 1), d=64)
    few = [
        Part(
            p.queries.expand(3, -1, -1, -1), *(x.expand(3, 2, -1, -1) for x in (p.keys, p.values)), p.visible
        )
        for p in some
    ]
    found = attend(few, scaling=0.3)
    torch.testing.assert_close(found.double(), one_softmax(few, 0.3), atol=2e-5, rtol=1e-5)
    assert taken == [2]


def test_what_they_do_not_take_is_pytorchs(taken):
    some = some_parts(30, (Triangle.LOWER, 40))
    attend(some, scaling=0.3, softcap=5.0)
    attend(some, scaling=0.3, sink_logits=torch.zeros(6))
    for dtype in (torch.float64, torch.bfloat16):
        attend(
            [Part(p.queries.to(dtype), p.keys.to(dtype), p.values.to(dtype), p.visible) for p in some],
            scaling=0.3,
        )
    apart = [Part(p.queries, p.keys.mT.contiguous().mT, p.values, p.visible) for p in some]
    attend(apart, scaling=0.3)
    attend([*some, parts.Partial(randn(1, 6, 30, 16), randn(1, 6, 30))], scaling=0.3)
    some[1].keys.requires_grad_()
    attend(some, scaling=0.3).sum().backward()
    assert some[1].keys.grad is not None and taken == []
    with torch.no_grad():
        attend(some, scaling=0.3)
    assert taken == [2]


@pytest.mark.parametrize(
    "wrong",
    [
        (randn(1, 6, 4, 16), randn(1, 2, 5, 16), randn(1, 2, 5, 16), Triangle.LOWER),
        (randn(1, 6, 4, 16), randn(1, 2, 5, 16), randn(1, 2, 5, 8), None),
        (randn(1, 5, 4, 16), randn(1, 2, 5, 16), randn(1, 2, 5, 16), None),
        (randn(1, 6, 4, 16), randn(1, 2, 5, 16), randn(1, 2, 5, 16), torch.ones(1, 1, 4, 5)),
        (randn(1, 6, 4, 16), randn(1, 2, 5, 16), randn(1, 2, 5, 16), torch.ones(5, 4).bool().T[None, None]),
        (randn(1, 6, 4, 16), randn(1, 2, 5, 16), randn(1, 2, 5, 16), torch.ones(1, 1, 4, 6).bool()),
        (randn(1, 6, 4, 16), randn(1, 2, 0, 16), randn(1, 2, 0, 16), None),
    ],
    ids=["no triangle", "values", "heads", "numbers", "apart", "too long", "no keys"],
)
def test_what_lies_otherwise_is_refused(wrong):
    with pytest.raises(StateError, match="attend_blocks does not take"):
        attend_blocks([wrong], 0.3)


def test_few_products_and_few_queries_are_left_to_pytorch(taken, monkeypatch):
    some = some_parts(10, (20, 30))
    monkeypatch.setattr(compiled_parts, "_LEAST_PRODUCTS", 10 * 6 * 16 * 50 + 1)
    attend(some, scaling=0.3)
    assert taken == []
    monkeypatch.setattr(compiled_parts, "_LEAST_PRODUCTS", 10 * 6 * 16 * 50)
    monkeypatch.setattr(compiled_parts, "_FEWEST", 11)
    attend(some, scaling=0.3)
    assert taken == []
    monkeypatch.setattr(compiled_parts, "_FEWEST", 10)
    attend(some, scaling=0.3)
    assert taken == [2]


def test_kernels_that_are_wrong_are_left_with_a_warning(taken, monkeypatch):
    monkeypatch.setattr(compiled_parts, "attend_blocks", lambda some, scaling: torch.zeros(2, 6, 70, 20))
    monkeypatch.setattr(compiled_parts, "_is_right_for_many", compiled_parts._is_right_for_many.__wrapped__)
    some = some_parts(20, (Triangle.LOWER, 30))
    with pytest.warns(UserWarning, match="attend wrongly"):
        found = attend(some, scaling=0.3)
    torch.testing.assert_close(found.double(), one_softmax(some, 0.3), atol=1e-5, rtol=1e-5)
    assert taken == []


def test_they_follow_neither_the_default_dtype_nor_device_nor_autocast(taken, monkeypatch):
    monkeypatch.setattr(compiled_parts, "_is_right_for_many", compiled_parts._is_right_for_many.__wrapped__)
    some = some_parts(20, (Triangle.LOWER, 30))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
            found = attend(some, scaling=0.3)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found.double(), one_softmax(some, 0.3), atol=1e-5, rtol=1e-5)
    assert taken == [2]
