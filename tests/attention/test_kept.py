"""Policies that choose what to keep equal the brute-force reference: groups, chunks, rows, copies, states."""

from __future__ import annotations

import dataclasses
import functools
from itertools import pairwise

import pytest
import torch

import tests.tiny as tiny
from everlong.attention import H2O, InfiniPot, PyramidKV, SirLLM, SnapKV, attach, received, with_sinks
from everlong.attention.kept import KeptMemory
from everlong.attention.kept_view import best, least_of
from everlong.errors import ConfigurationError, UnsupportedUseError
from tests.attention.test_exactness import MODELS, model_of
from tests.reference.kept import KeptSpec
from tests.reference.model import reference_logits

LENGTH, PAD = 42, 4
STREAMS = {
    "h2o": H2O(window=14, recent=6, group=4),
    "h2o, one by one": H2O(window=11, sinks=2, recent=3, group=1),
    "sir-llm": SirLLM(window=16, sinks=2, recent=6, group=4),
    "sir-llm, one by one": SirLLM(window=10, sinks=0, recent=2, group=1, decay=0.3),
    "infini-pot": InfiniPot(window=16, sinks=1, compressed=9, recent=3, group=4),
    "infini-pot, one by one": InfiniPot(window=12, sinks=0, compressed=11, recent=2, group=1),
}
SNAPS = {
    "snap-kv": SnapKV(budget=16, observed=5, pooled=3),
    "snap-kv, single keys": SnapKV(budget=9, observed=4, pooled=1, sinks=3),
    "snap-kv, a share": SnapKV(ratio=0.4, observed=5, pooled=5),
    "pyramid-kv": PyramidKV(budget=14, observed=4, pooled=3, slope=4),
}
MAIN = ["h2o", "sir-llm", "infini-pot"]
CHUNKS = {
    "one call": (0, LENGTH),
    "uneven chunks": (0, 2, 3, 11, 12, 17, 29, 31, LENGTH),
    "token by token": tuple(range(LENGTH + 1)),
    "prefill, then token by token": (0, 28, *range(29, LENGTH + 1)),
}
READ = 30  # tokens after which reading ends
SNAP_CHUNKS = {
    "one call": (0, READ, LENGTH),
    "uneven chunks": (0, 3, 4, 19, READ, 33, LENGTH),
    "token by token": tuple(range(LENGTH + 1)),
    "prefill, then token by token": (0, READ, *range(READ + 1, LENGTH + 1)),
}
EITHER = {**STREAMS, **SNAPS}


@functools.cache
def ids_of(rows=1):
    """Return tokens of which none comes twice in a row: in the first layer their keys would be the same."""
    draws = torch.Generator().manual_seed(2)
    some = [3 + torch.randperm(tiny.VOCAB - 3, generator=draws)[:LENGTH] for _ in range(2)]
    return torch.stack(some)[:rows]


@functools.cache
def surprisal_of(rows=1):
    return 5 * torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(7))[:rows]


def groups(policy, chunks, pad=None):
    """Return where groups begin in a row: at chunks, where the window is full, at multiples of a group."""
    edges = set()
    for low, high in pairwise(chunks):
        for begin, stop in pairwise([low, *({policy.window} & set(range(low + 1, high))), high]):
            edges.add(begin)
            if pad is not None or stop > policy.window:
                edges |= {at for at in range(begin, stop) if at % policy.group == 0}
    return tuple(sorted({max(0, edge - (pad or 0)) for edge in edges}))


def spec_of(name, chunks, row=0, pad=None, ends=(READ,), layers=2):
    policy = EITHER[name].resolve(tiny.TRAINING_LENGTH)
    before = tuple(sorted({max(0, at - (pad or 0)) for at in chunks}))
    if isinstance(policy, SnapKV):
        ends = tuple(end - (pad or 0) for end in ends)
        budgets = tuple(policy.budgets(ends[0], layers))
        return KeptSpec(
            *("snap-kv", None, policy.sinks, policy.observed),
            pooled=policy.pooled,
            budgets=budgets,
            groups=before,
            chunks=before,
            ends=ends,
        )
    turns = [READ - (pad or 0)] if READ in chunks else []
    return KeptSpec(
        *(name.split(",")[0], policy.window, policy.sinks, policy.recent, getattr(policy, "compressed", 0)),
        groups=groups(policy, chunks, pad),
        chunks=before,
        turns=tuple(turns),
        decay=getattr(policy, "decay", 1.0),
        surprisal=tuple(surprisal_of(2)[row, pad or 0 :].tolist()),
    )


@torch.no_grad()
def read(model, cache, ids, edges, mask=None, ends=(READ,), surprisal=None):
    """Run pieces, tell the policy their surprisal, and where reading ends."""
    told = surprisal_of(2)[: len(ids)] if surprisal is None else surprisal
    pieces = []
    for a, b in pairwise(edges):
        if a in ends:
            cache.end_of_prefill()
        seen = None if mask is None else mask[:, :b]
        pieces.append(model(ids[:, a:b], attention_mask=seen, **tiny.cached(cache), use_cache=True).logits)
        cache.after_forward(ids[:, a:b], told[:, a:b])
    return torch.cat(pieces, dim=1)


def off(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def differs(model, name, chunks, ends=(READ,)):
    """Return how far a row is from the reference."""
    with attach(model_of(model), EITHER[name]) as handle:
        cache = handle.new_cache()
        ours = read(model_of(model), cache, ids_of(), chunks, ends=ends)
        layers = sum(isinstance(memory, KeptMemory) for memory in cache.memories.values())
    spec = spec_of(name, chunks, ends=ends, layers=layers)
    if layers == 1:  # of three, the second
        spec = dataclasses.replace(spec, budgets=spec.budgets * 3)
    return off(ours, reference(model, spec))


@functools.cache
def reference(model, spec, row=0, pad=0):
    return reference_logits(model_of(model), ids_of(2)[row : row + 1, pad:], spec)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("policy", STREAMS)
def test_equals_the_reference_at_every_position(policy, chunks):
    assert differs("grouped heads", policy, CHUNKS[chunks]) < 1e-5


@pytest.mark.parametrize("chunks", SNAP_CHUNKS)
@pytest.mark.parametrize("policy", SNAPS)
def test_what_is_compressed_when_reading_ends_equals_the_reference(policy, chunks):
    assert differs("grouped heads", policy, SNAP_CHUNKS[chunks]) < 1e-5


@pytest.mark.parametrize("model", [model for model in MODELS if model != "grouped heads"])
@pytest.mark.parametrize("policy", [*MAIN, "snap-kv", "pyramid-kv"])
def test_equals_the_reference_in_other_models(model, policy):
    assert differs(model, policy, SNAP_CHUNKS["prefill, then token by token"]) < 1e-5


def test_what_was_written_is_weighed_with_the_rest_when_the_next_input_was_read():
    for policy in ("snap-kv", "snap-kv, single keys"):
        assert differs("grouped heads", policy, (0, 24, 25, 26, 38, *range(39, LENGTH + 1)), (24, 38)) < 1e-5


@pytest.mark.parametrize("chunks", ["one call", "uneven chunks", "token by token"])
@pytest.mark.parametrize("policy", [*MAIN, *SNAPS])
def test_padded_rows_equal_rows_alone(policy, chunks):
    model, ids = model_of("grouped heads"), ids_of(2)
    edges = (SNAP_CHUNKS if policy in SNAPS else CHUNKS)[chunks]
    mask = torch.ones_like(ids)
    mask[1, :PAD] = 0
    with attach(model, EITHER[policy]) as handle:
        cache = handle.new_cache()
        ours = read(model, cache, ids, edges, mask)
        alike = read(model, handle.new_cache(), ids, edges)
    for row, pad in enumerate((0, PAD)):
        theirs = reference("grouped heads", spec_of(policy, edges, row, pad), row, pad)
        assert off(ours[row : row + 1, pad:], theirs) < 1e-5
    assert off(alike[1:], reference("grouped heads", spec_of(policy, edges, 1), 1)) < 1e-5


@pytest.mark.parametrize("policy", ["h2o", "snap-kv"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_in_every_family_chunks_that_end_on_groups_make_no_difference(family, policy):
    """SirLLM and InfiniPot are told surprisal after a forward: what they keep depends on the chunks."""
    pieces = (0, *range(4, LENGTH, 4), LENGTH) if policy == "h2o" else (0, 12, 13, 20, READ, LENGTH)
    whole = (0, LENGTH) if policy == "h2o" else (0, READ, LENGTH)
    model = tiny.build(family)
    with attach(model, EITHER[policy]) as handle:
        found = [read(model, handle.new_cache(), ids_of(), edges) for edges in (whole, pieces)]
    assert off(found[1], found[0]) < 1e-4


@pytest.mark.parametrize("policy", EITHER)
def test_a_budget_that_holds_the_input_gives_the_stock_model(policy):
    model, ids = model_of("grouped heads"), ids_of(2)
    mask = torch.ones_like(ids)
    mask[1, :PAD] = 0
    whole = {"window": LENGTH} if policy in STREAMS else {"budget": LENGTH, "ratio": None}
    with torch.no_grad():
        stock = model(ids, attention_mask=mask).logits
    with attach(model, dataclasses.replace(EITHER[policy], **whole)) as handle:
        for edges in SNAP_CHUNKS.values():
            cache = handle.new_cache()
            assert off(read(model, cache, ids, edges, mask)[mask.bool()], stock[mask.bool()]) < 1e-5
            assert cache.forgotten == 0


@pytest.mark.parametrize("policy", ["h2o, one by one", *MAIN[1:], "snap-kv", "pyramid-kv"])
def test_the_comparison_notices_other_constants(policy):
    right, edges, seen = EITHER[policy].resolve(None), SNAP_CHUNKS["prefill, then token by token"], set()
    model, theirs = model_of("grouped heads"), reference("grouped heads", spec_of(policy, edges))
    names = ("window", "sinks", "recent", "compressed", "budget", "observed", "pooled", "slope")
    for name in (name for name in names if hasattr(right, name)):
        for step in (-1, 1, 2):
            try:
                mutant = dataclasses.replace(right, **{name: getattr(right, name) + step}).resolve(None)
            except ConfigurationError:
                continue
            with attach(model, mutant) as handle:
                if off(read(model, handle.new_cache(), ids_of(), edges), theirs) > 1e-4:
                    seen.add(name)
    assert {name for name in names if hasattr(right, name)} <= seen


@pytest.mark.parametrize("policy", [*MAIN, "snap-kv", "pyramid-kv"])
def test_copies_saved_states_and_chosen_rows_go_on(policy):
    model, ids = model_of("grouped heads"), tiny.random_ids(2, 90)
    told = torch.rand(2, 90, generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :PAD] = 0
    rest = (60, 61, 62, 75, *range(76, 91))
    with attach(model, EITHER[policy]) as handle:
        cache = handle.new_cache()
        read(model, cache, ids, (0, 40, *range(41, 61)), mask, ends=(40,), surprisal=told)
        copies = [cache.fork(), handle.restore_cache(*cache.state())]
        rows = cache.fork()
        rows.batch_select_indices(torch.tensor([1, 1, 0]))
        theirs = read(model, cache, ids, rest, mask, ends=(75,), surprisal=told)
        for twin in copies:
            assert torch.equal(read(model, twin, ids, rest, mask, ends=(75,), surprisal=told), theirs)
        order = [1, 1, 0]
        picked = read(model, rows, ids[order], rest, mask[order], ends=(75,), surprisal=told[order])
        assert off(picked, theirs[order]) < 1e-5


def test_a_row_that_kept_fewer_than_another_goes_on_alone():
    model, ids = model_of("grouped heads"), ids_of(2)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    for policy in (PyramidKV(budget=20, observed=4, slope=4), SnapKV(ratio=0.5, observed=4)):
        with attach(model, policy) as handle:
            both = handle.new_cache()
            read(model, both, ids, (0, READ, READ + 1), mask)
            for row, pad in enumerate((0, 9)):
                one, alone = both.fork(), handle.new_cache()
                one.batch_select_indices(torch.tensor([row]))
                own = ids[row : row + 1]
                read(model, alone, own[:, pad:], (0, READ - pad, READ + 1 - pad), ends=(READ - pad,))
                ours = read(model, one, own, (31, 35, LENGTH), mask[row : row + 1])
                assert off(ours, read(model, alone, own[:, pad:], (31 - pad, 35 - pad, LENGTH - pad))) < 1e-5


@pytest.mark.parametrize("policy", STREAMS)
def test_no_more_than_the_window_is_held_at_any_time(policy):
    model, ids = model_of("grouped heads"), tiny.random_ids(1, 300)
    resolved = EITHER[policy].resolve(None)
    with attach(model, EITHER[policy]) as handle:
        cache, held = handle.new_cache(), []
        for a, b in pairwise((0, 100, *range(101, 121), 200, 300)):
            read(model, cache, ids, (a, b), surprisal=torch.zeros(1, 300))
            held.append(cache.kept)
            assert (cache.seen, cache.kept + cache.forgotten) == (b, b)
            for memory in cache.memories.values():
                assert memory.nbytes()["window"] == sum(
                    x.nbytes for x in (memory.keys, memory.values, *memory.index.values())
                )
                assert memory.keys.shape[2] <= resolved.window
                assert memory.index["at"].shape[2] == memory.held
        assert max(held) <= resolved.window


def test_bytes_are_foreseen():
    model, ids = model_of("grouped heads"), tiny.random_ids(1, 60)
    for policy in EITHER.values():
        with attach(model, policy) as handle:
            cache = handle.new_cache()
            read(model, cache, ids, (0, 40), surprisal=torch.zeros(1, 60))
            memory = next(iter(cache.memories.values()))
            spare = sum(x[:, :, memory.held :].nbytes for x in (memory.keys, memory.values))
            held = cache.kept if policy.span is None else policy.span
            if memory.held == held:
                assert cache.bytes_at(40)["window"] == cache.bytes()["window"] - 2 * spare


def test_what_was_passed_over_is_told_by_the_first_token_from_which_all_are_held():
    model = model_of("grouped heads")
    with attach(model, EITHER["h2o"]) as handle:
        cache = handle.new_cache()
        read(model, cache, ids_of(), (0, 10))
        assert cache.first_kept == 0
        read(model, cache, ids_of(), (10, 29, 30))
        for memory in cache.memories.values():
            at = memory.index["at"]
            assert all((at == index).any(-1).all() for index in range(memory.first, 30))
            assert not (at == memory.first - 1).any(-1).all()


def test_equal_tokens_stay_by_age_and_everything_that_is_kept_is_told():
    worth = torch.tensor([[[1.0, 3.0, 1.0, 3.0, 1.0]]])
    at = torch.tensor([[[9, 4, 2, 8, 5]]])
    assert best(worth, at, [3])[0].tolist() == [[[2, 1, 3]]]
    slots, dead = best(worth.repeat(2, 1, 1), at.repeat(2, 1, 1), [3, 2])
    assert slots[0].tolist() == [[2, 1, 3]] and slots[1, 0, 1:].tolist() == [1, 3]
    assert dead.tolist() == [[[False, False, False]], [[True, False, False]]]
    assert least_of(worth, at).tolist() == [[[0]]]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("rows", [1, 256])
def test_weights_are_shares_of_one_softmax_with_the_models_own_logits_in_it(softcap, rows, monkeypatch):
    monkeypatch.setattr(received, "_ROWS", rows)
    draws = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(2, h, n, 8, generator=draws) for h, n in ((4, 5), (2, 7), (2, 7)))
    sinks = torch.randn(4, generator=draws)
    visible = torch.ones(5, 7, dtype=torch.bool).tril(2)[None, None].repeat(2, 1, 1, 1)
    visible[1, :, :2] = False  # queries that see nothing
    how = received.Weighing(0.5, softcap, sinks)
    partial, found = received.weigh(queries, keys, values, visible, how)
    expected = torch.zeros(2, 2, 7)
    for row in range(2):
        for head in range(4):
            for i in range(2 * row, 5):
                logits = keys[row, head // 2] @ queries[row, head, i] * 0.5
                logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
                logits = logits[visible[row, 0, i]]
                weights = torch.cat((logits, sinks[head, None])).softmax(0)[:-1]
                expected[row, head // 2, : len(weights)] += weights
                mixed = logits.softmax(0) @ values[row, head // 2, : len(weights)]
                assert torch.allclose(partial.output[row, head, i], mixed, atol=1e-5)
    assert torch.allclose(found, expected, atol=1e-5)


def test_gradients_flow_through_what_is_kept():
    model = tiny.build("llama")
    for policy in (EITHER["h2o"], EITHER["infini-pot"], EITHER["snap-kv"]):
        with attach(model, policy) as handle:
            cache = handle.new_cache()
            with torch.inference_mode():
                for a, b in ((0, 13), (13, 14), (14, 20), (20, 21)):
                    model(ids_of()[:, a:b], **tiny.cached(cache), use_cache=True)
                    cache.after_forward(ids_of()[:, a:b], surprisal_of()[:, a:b])
            model.zero_grad()
            for a, b in ((21, 40), (40, 41)):
                model(ids_of()[:, a:b], **tiny.cached(cache), use_cache=True).logits.sum().backward()
                cache.after_forward(ids_of()[:, a:b], surprisal_of()[:, a:b])
            assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("policy", ["snap-kv", "pyramid-kv"])
def test_generate_which_does_not_tell_when_reading_ends_is_refused(policy):
    model = model_of("grouped heads")
    with attach(model, EITHER[policy]) as handle:
        with pytest.raises(UnsupportedUseError, match="end_of_prefill"):
            model.generate(ids_of(), max_new_tokens=2)
        cache = handle.new_cache()
        model(ids_of()[:, :-1], **tiny.cached(cache), use_cache=True)
        cache.end_of_prefill()
        model.generate(ids_of(), max_new_tokens=2, **tiny.cached(cache))
        assert cache.forgotten > 0


def test_generate_which_tells_no_surprisal_is_refused_with_a_cache_of_ones_own_too():
    model = model_of("grouped heads")
    with attach(model, EITHER["sir-llm"]) as handle:
        for given in ({}, tiny.cached(handle.new_cache())):
            with pytest.raises(UnsupportedUseError, match="needs the surprisal"):
                model.generate(ids_of(), max_new_tokens=2, **given)


def test_a_pyramid_stays_one_from_turn_to_turn():
    model, policy = tiny.build("llama", num_hidden_layers=4), PyramidKV(budget=20, observed=4, pooled=1)
    with attach(model, policy) as handle:
        cache, held = handle.new_cache(), []
        for turn in range(3):
            read(model, cache, tiny.random_ids(1, 60, seed=turn), (0, 60))
            cache.end_of_prefill()
            held.append([memory.held for memory in cache.memories.values()])
    assert held == [policy.budgets(10_000, 4)] * 3


def test_a_step_after_one_with_gradients_leaves_their_graph_as_it_was():
    model, policy = model_of("grouped heads"), H2O(window=12, recent=4, group=2)
    with attach(model, policy) as handle:
        cache = handle.new_cache()
        embedded = model.get_input_embeddings()(ids_of()).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, **tiny.cached(cache), use_cache=True).logits
        read(model, cache, ids_of(), (0, 1))
        logits.sum().backward()
    assert embedded.grad.abs().max() > 0


@pytest.mark.parametrize("policy", [*MAIN, "snap-kv"])
def test_tokens_cannot_be_taken_back(policy):
    with attach(model_of("grouped heads"), EITHER[policy]) as handle:
        cache = handle.new_cache()
        with pytest.raises(UnsupportedUseError, match="none goes back"), cache.provisional():
            pass


def test_what_is_pinned_stays():
    assert with_sinks(SnapKV(budget=64), 20).sinks == 20
    assert with_sinks(H2O(window=64), 20).sinks == 20
    assert with_sinks(SnapKV(ratio=0.5), 2000).sinks == 2000
    with pytest.raises(ConfigurationError, match="budget=53 or more"):
        with_sinks(SnapKV(budget=50), 20)
    with pytest.raises(ConfigurationError, match="pin less"):
        with_sinks(SirLLM(window=20), 20)


def test_budgets_of_a_pyramid_fall_evenly_and_keep_their_mean():
    policy = PyramidKV(budget=200, observed=20)
    budgets = policy.budgets(10_000, 10)
    assert (budgets[0], budgets[-1]) == (20 + 351, 20 + 9)
    steps = {a - b for a, b in pairwise(budgets)}
    assert max(steps) - min(steps) <= 1 and abs(sum(budgets) / 10 - 200) < 1
    short = policy.budgets(300, 10)
    assert short[0] == 300 and abs(sum(short) / 10 - 200) < 1
    assert PyramidKV(budget=200, slope=1).budgets(10_000, 4) == [200] * 4


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: H2O(window=10, recent=10).resolve(None), "cannot hold 0 sinks, the latest 10"),
        (lambda: H2O(window=20, recent=5, group=6).resolve(None), "a group of at most recent"),
        (lambda: H2O().resolve(None), r"pass H2O\(window=...\)"),
        (lambda: H2O(group=0), "group must be a whole number"),
        (lambda: SirLLM(window=4).resolve(None), "use a larger window"),
        (lambda: SirLLM(decay=0), "decay must be a number above 0 and at most 1"),
        (lambda: SirLLM(sinks=-1), "sinks must be a whole number"),
        (lambda: InfiniPot(window=64).resolve(None), "compressed to 32 cannot hold 4 sinks"),
        (lambda: InfiniPot(window=100, compressed=99, group=2).resolve(None), "a group of 2"),
        (lambda: InfiniPot(compressed=0), "compressed must be a whole number"),
        (lambda: InfiniPot(recent=None), "recent must be a whole number"),
        (lambda: SnapKV(budget=32), "use budget=33 or more"),
        (lambda: SnapKV(ratio=1.5), "ratio must be a number above 0 and at most 1"),
        (lambda: SnapKV(budget=100, ratio=0.5), "not both"),
        (lambda: SnapKV(pooled=4), "pooled=4 must be odd"),
        (lambda: PyramidKV(slope=0), "slope must be a whole number"),
    ],
)
def test_budgets_that_cannot_work_are_refused(make, said):
    with pytest.raises(ConfigurationError, match=said):
        make()
