"""Attention over parts is one softmax: any split, any kernel, with and without gradients."""

import itertools

import pytest
import torch

import everlong.attention.parts as parts_module
from everlong.attention.parts import Part, Partial, Triangle, attend, merge_logits

BATCH, HEADS, KV_HEADS, QUERIES, KEYS, SIZE = 2, 4, 2, 5, 12, 8
SPLITS = {"one part": [12], "two parts": [7, 5], "four parts": [1, 6, 2, 3]}
SCALING = 0.4


def tensors(dtype=torch.float32, heads=HEADS, kv_heads=KV_HEADS, seed=0):
    """Queries, keys, values and who sees whom; every query sees a key, and none sees them all."""
    torch.manual_seed(seed)
    queries = torch.randn(BATCH, heads, QUERIES, SIZE, dtype=torch.float64)
    keys, values = (torch.randn(BATCH, kv_heads, KEYS, SIZE, dtype=torch.float64) for _ in range(2))
    visible = torch.rand(BATCH, 1, QUERIES, KEYS) < 0.6
    visible[..., 0], visible[..., 1], visible[..., 2, 7:] = True, False, False
    return queries.to(dtype), keys.to(dtype), values.to(dtype), visible


def one_softmax(queries, keys, values, visible, softcap=None, sink_logits=None):
    """Write it down in float64: all keys at once."""
    groups = queries.shape[1] // keys.shape[1]
    queries = queries.double()
    keys, values = (tensor.double().repeat_interleave(groups, 1) for tensor in (keys, values))
    logits = queries @ keys.transpose(-1, -2) * SCALING
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible, -torch.inf)
    if sink_logits is not None:
        column = sink_logits.double()[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat((logits, column), -1)
    return torch.softmax(logits, -1)[..., : keys.shape[2]] @ values


def split(queries, keys, values, visible, sizes):
    edges = [0, *itertools.accumulate(sizes)]
    return [
        Part(queries, keys[:, :, a:b], values[:, :, a:b], visible[..., a:b])
        for a, b in itertools.pairwise(edges)
    ]


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("softcap", [None, 1.5], ids=["no cap", "soft-cap"])
@pytest.mark.parametrize("has_sink", [False, True], ids=["no sink logits", "sink logits"])
@pytest.mark.parametrize(
    "heads", [(4, 4), (4, 2), (4, 1)], ids=["full heads", "grouped heads", "one key head"]
)
@pytest.mark.parametrize("gradients", [False, True], ids=["kernel", "explicit"])
def test_parts_merge_to_one_softmax(sizes, softcap, has_sink, heads, gradients):
    given = tensors(heads=heads[0], kv_heads=heads[1])
    sink_logits = torch.linspace(-1, 2, heads[0]) if has_sink else None
    expected = one_softmax(*given, softcap, sink_logits)
    given[0].requires_grad_(gradients)
    ours = attend(split(*given, sizes), scaling=SCALING, softcap=softcap, sink_logits=sink_logits)
    torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("triangle", Triangle)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["full heads", "grouped heads"])
@pytest.mark.parametrize("path", ["kernel", "explicit", "soft-cap"])
@pytest.mark.parametrize("n", [1, 2, 300], ids=["one", "two", "more than are held at once"])
def test_triangles_are_the_masks_they_stand_for(triangle, heads, path, n):
    torch.manual_seed(1)
    queries = torch.randn(BATCH, heads[0], n, SIZE).requires_grad_(path == "explicit")
    keys, values, more, of_more = (torch.randn(BATCH, heads[1], m, SIZE) for m in (n, n, 3, 3))
    square = torch.ones(n, n).tril() if triangle is Triangle.LOWER else torch.ones(n, n).triu()
    visible = torch.cat((square.bool(), torch.ones(n, 3, dtype=torch.bool)), 1)[None, None]
    softcap = 1.5 if path == "soft-cap" else None
    expected = one_softmax(
        queries, torch.cat((keys, more), 2), torch.cat((values, of_more), 2), visible, softcap
    )
    parts = [Part(queries, keys, values, triangle), Part(queries, more, of_more)]
    ours = attend(parts, scaling=SCALING, softcap=softcap)
    torch.testing.assert_close(ours.double(), expected, atol=5e-6, rtol=0)


def test_the_kernel_and_the_explicit_path_are_both_taken(monkeypatch):
    """Or the two columns above would be one."""
    taken = []
    explicit = parts_module._explicit
    monkeypatch.setattr(parts_module, "_explicit", lambda *a: taken.append("explicit") or explicit(*a))
    given = tensors()
    attend(split(*given, [12]), scaling=SCALING)
    assert not taken
    attend(split(*given, [12]), scaling=SCALING, softcap=1.0)
    given[1].requires_grad_()
    attend(split(*given, [12]), scaling=SCALING)
    with torch.no_grad():
        attend(split(*given, [12]), scaling=SCALING)
    assert len(taken) == 2


def test_a_part_without_a_mask_shows_everything():
    queries, keys, values, visible = tensors()
    ours = attend(
        [Part(queries, keys[:, :, :8], values[:, :, :8]), Part(queries, keys[:, :, 8:], values[:, :, 8:])],
        scaling=SCALING,
    )
    expected = one_softmax(queries, keys, values, torch.ones_like(visible))
    torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_part_of_which_a_query_sees_nothing_has_no_weight(softcap):
    queries, keys, values, visible = tensors()
    visible[..., 6:] = False
    values[:, :, 6:] = 1e4  # loud, if it were heard
    ours = attend(split(queries, keys, values, visible, [6, 6]), scaling=SCALING, softcap=softcap)
    expected = one_softmax(queries, keys, values, visible, softcap)
    torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=0)


def test_each_part_may_place_the_queries_elsewhere():
    near, keys, values, visible = tensors()
    far = tensors(seed=1)[0]
    ours = attend(
        [
            Part(near, keys[:, :, :7], values[:, :, :7], visible[..., :7]),
            Part(far, keys[:, :, 7:], values[:, :, 7:], visible[..., 7:]),
        ],
        scaling=SCALING,
    )
    # The same as one softmax over doubled dimensions, each key answering to one half of the query.
    queries = torch.cat((near, far), -1)
    zeros = torch.zeros_like(keys)
    first, second = torch.cat((keys, zeros), -1), torch.cat((zeros, keys), -1)
    both = torch.cat((first[:, :, :7], second[:, :, 7:]), 2)
    torch.testing.assert_close(ours.double(), one_softmax(queries, both, values, visible), atol=1e-6, rtol=0)


def test_a_visible_mask_per_head():
    queries, keys, values, visible = tensors()
    visible = visible.repeat(1, HEADS, 1, 1)
    visible[:, 1, :, 3:9], visible[:, 3, :, 9:] = False, False
    ours = attend(split(queries, keys, values, visible, [4, 8]), scaling=SCALING)
    torch.testing.assert_close(ours.double(), one_softmax(queries, keys, values, visible), atol=1e-6, rtol=0)


def test_keys_chosen_per_query_merge_with_the_rest():
    """`merge_logits`: finished logits and values of each query's own, -inf where there is none."""
    queries, keys, values, visible = tensors(kv_heads=HEADS)
    near, far = visible.clone(), visible.clone()
    near[..., 7:], far[..., :7] = False, False
    logits = (queries @ keys.transpose(-1, -2) * SCALING).masked_fill(~far, -torch.inf)
    chosen = merge_logits(logits, values[:, :, None].expand(-1, -1, QUERIES, -1, -1))
    ours = attend([Part(queries, keys, values, near), chosen], scaling=SCALING)
    torch.testing.assert_close(ours.double(), one_softmax(queries, keys, values, visible), atol=1e-6, rtol=0)


def test_large_logits_neither_overflow_nor_vanish():
    queries, keys, values, visible = tensors()
    ours = attend(split(queries * 300, keys, values, visible, [7, 5]), scaling=SCALING)
    expected = one_softmax(queries * 300, keys, values, visible)
    torch.testing.assert_close(ours.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_half_precision_stays_within_its_rounding(dtype, sizes):
    """Derived: the output is a convex combination of values up to v = max|values|.

    Rounding the probabilities to the dtype (relative error eps/2 each, as the fused kernels do) moves it by
    at most eps/2 * v, rounding each part's output by eps/2 * v once more, and the merged one a third time;
    inputs are rounded before the comparison. Accumulation is in float32 throughout.
    """
    given = tensors(dtype)
    ours = attend(split(*given, sizes), scaling=SCALING)
    assert ours.dtype == dtype
    bound = 1.5 * torch.finfo(dtype).eps * given[2].abs().max().item()
    assert (ours.double() - one_softmax(*given)).abs().max() <= bound


# --- gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("softcap", [None, 1.5], ids=["no cap", "soft-cap"])
@pytest.mark.parametrize("has_sink", [False, True], ids=["no sink logits", "sink logits"])
def test_gradients_equal_those_of_one_softmax(sizes, softcap, has_sink):
    *given, visible = tensors()
    sink_logits = torch.linspace(-1, 2, HEADS)
    weights = torch.randn(BATCH, HEADS, QUERIES, SIZE, dtype=torch.float64)

    def gradients(compute):
        leaves = [tensor.clone().requires_grad_() for tensor in (*given, sink_logits)]
        output = compute(*leaves[:3], visible, leaves[3] if has_sink else None)
        return torch.autograd.grad((output * weights).sum(), leaves[: 3 + has_sink])

    ours = gradients(
        lambda q, k, v, seen, sink: attend(
            split(q, k, v, seen, sizes), scaling=SCALING, softcap=softcap, sink_logits=sink
        )
    )
    expected = gradients(lambda q, k, v, seen, sink: one_softmax(q, k, v, seen, softcap, sink))
    for our, their in zip(ours, expected, strict=True):
        torch.testing.assert_close(our, their, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("softcap", [None, 1.5], ids=["no cap", "soft-cap"])
def test_gradcheck_through_parts_sink_logits_and_chosen_keys(softcap):
    queries, keys, values, visible = tensors(torch.float64)
    given = queries[:1, :, :2, :4], keys[:1, :, :5, :4], values[:1, :, :5, :4]
    visible = visible[:1, :, :2, :5]
    chosen_logits = torch.randn(1, HEADS, 2, 3, dtype=torch.float64)
    chosen_values = torch.randn(1, HEADS, 2, 3, 4, dtype=torch.float64)
    sink_logits = torch.linspace(-1, 2, HEADS, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (*given, sink_logits, chosen_logits, chosen_values)]

    def through(q, k, v, sinks, logits, values):
        parts = [*split(q, k, v, visible, [2, 3]), merge_logits(logits, values)]
        return attend(parts, scaling=SCALING, softcap=softcap, sink_logits=sinks)

    assert torch.autograd.gradcheck(through, leaves)


def test_a_gradient_that_only_one_input_wants_still_takes_the_explicit_path():
    """The flash kernel's log-sum-exp has no gradient: merging its parts would be silently wrong."""
    *given, visible = tensors()
    for which in range(3):
        inputs = [tensor.clone() for tensor in given]
        inputs[which].requires_grad_()
        ours = attend(split(*inputs, visible, [7, 5]), scaling=SCALING).sum()
        expected = one_softmax(*inputs, visible).sum()
        torch.testing.assert_close(
            torch.autograd.grad(ours, inputs[which])[0],
            torch.autograd.grad(expected, inputs[which])[0],
            atol=1e-5,
            rtol=1e-4,
        )


def test_a_finished_part_passes_through():
    output, lse = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3)
    assert torch.equal(attend([Partial(output, lse)], scaling=1.0), output)
