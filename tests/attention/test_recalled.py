"""Policies that recall equal the brute-force reference: groups, chunks, rows, tiers, copies, saved states."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings
from itertools import pairwise

import pytest
import torch

import tests.tiny as tiny
from everlong.attention import (
    InfiniteHiP,
    InfLLM,
    Quest,
    ReAttention,
    Recall,
    Tier,
    attach,
    coding,
    forward,
    key_index,
    layer_memory,
    tiers,
    with_sinks,
)
from everlong.attention.positions import Rotation
from everlong.attention.ready import ReadyTokens
from everlong.attention.ready_pool import ReadyPool
from everlong.attention.standing_step import StandingStep
from everlong.attention.view import LayerCall, LayerView
from everlong.errors import ConfigurationError, UnsupportedUseError
from tests.attention.test_exactness import MODELS, model_of
from tests.reference.attention import ReferenceSpec
from tests.reference.model import reference_logits

LENGTH = 42
PAD = 5
EXACT = Tier(precision="exact")
KINDS = {
    InfLLM: "inf-llm",
    ReAttention: "re-attention",
    Recall: "recall",
    Quest: "quest",
    InfiniteHiP: "infinite-hip",
}
STAGES = {"coarse": 8, "medium": 4, "coarse_steps": 8, "medium_steps": 4, "block_steps": 2}
POLICIES = {
    "inf-llm": InfLLM(window=16, sinks=2, recalled=6, block=3, representatives=2, group=8),
    "inf-llm, one block": InfLLM(window=12, sinks=0, recalled=4, block=4, representatives=9, group=5),
    "inf-llm, small groups": InfLLM(window=14, sinks=1, recalled=6, block=2, representatives=1, group=1),
    "recall": Recall(window=16, sinks=2, recalled=6, block=3, group=8, probes=3, layers=2, steps=3, lead=1),
    "recall, single keys": Recall(
        window=12,
        sinks=0,
        recalled=3,
        block=1,
        group=5,
        probes=1,
        layers=1,
        steps=1,
        distance=2,
        momentum=0.0,
    ),
    "recall, many steps": Recall(
        window=12,
        sinks=1,
        recalled=4,
        block=2,
        group=5,
        probes=9,
        layers=3,
        steps=7,
        distance=0,
        lead=2,
        momentum=0.9,
    ),
    "re-attention": ReAttention(window=16, sinks=2, recalled=6, votes=2, radius=1, group=8),
    "re-attention, single keys": ReAttention(window=12, sinks=0, recalled=3, votes=1, radius=0, group=5),
    "re-attention, wide": ReAttention(window=20, sinks=1, recalled=10, votes=3, radius=2, group=7),
    "quest": Quest(window=16, sinks=2, recalled=6, block=3, group=8),
    "quest, small pages": Quest(window=12, sinks=0, recalled=4, block=2, group=5),
    "quest, one page": Quest(window=14, sinks=1, recalled=5, block=5, group=1),
    "infinite-hip": InfiniteHiP(window=16, sinks=2, recalled=6, block=2, group=8, **STAGES),
    "infinite-hip, three stages": InfiniteHiP(window=8, sinks=1, recalled=1, block=1, group=5, **STAGES),
    "infinite-hip, one chunk": InfiniteHiP(
        window=14, sinks=0, recalled=2, coarse=16, medium=2, block=2, group=1, coarse_steps=5, block_steps=3
    ),
}
ONE_OF_EACH = ["inf-llm", "re-attention", "recall", "quest", "infinite-hip"]
CHUNKS = {
    "one call": (0, LENGTH),
    "uneven chunks": (0, 2, 3, 11, 12, 17, 29, 31, LENGTH),
    "token by token": tuple(range(LENGTH + 1)),
    "prefill, then token by token": (0, 28, *range(29, LENGTH + 1)),
}


def groups(policy, chunks, pad=None):
    """Return where groups begin in a row: with chunks, where the window is full, and at multiples of a group.

    Parameters
    ----------
    pad
        Tokens before the row's first, in a batch that has padding; None: it has none.
    """
    edges = {policy.window}
    for low, high in pairwise(chunks):
        for begin, stop in pairwise([low, *({policy.window} & set(range(low + 1, high))), high]):
            edges.add(begin)
            if pad is not None or stop > policy.window:
                edges |= {at for at in range(begin, stop) if at % policy.group == 0}
    return tuple(sorted({max(0, edge - (pad or 0)) for edge in edges if edge < LENGTH}))


def spec_of(policy):
    known = {field.name for field in dataclasses.fields(ReferenceSpec)}
    options = dataclasses.asdict(policy.resolve(tiny.TRAINING_LENGTH))
    return ReferenceSpec(kind=KINDS[type(policy)], **{k: v for k, v in options.items() if k in known})


@functools.cache
def ids_of(rows=1):
    """Return tokens of which none comes twice in a row: in the first layer their keys would be the same."""
    draws = torch.Generator().manual_seed(2)
    some = [3 + torch.randperm(tiny.VOCAB - 3, generator=draws)[:LENGTH] for _ in range(2)]
    return torch.stack(some)[:rows]


@functools.cache
def reference(model, policy, edges, row=0, pad=0):
    return reference_logits(
        model_of(model), ids_of(2)[row : row + 1, pad:], spec_of(POLICIES[policy]), edges=edges
    )


@torch.no_grad()
def read(model, cache, ids, edges, mask=None):
    pieces = [
        model(
            ids[:, a:b],
            attention_mask=None if mask is None else mask[:, :b],
            **tiny.cached(cache),
            use_cache=True,
        ).logits
        for a, b in pairwise(edges)
    ]
    return torch.cat(pieces, dim=1)


def off(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def differs(model, policy, chunks):
    """Return how far a row is from the reference."""
    edges = CHUNKS[chunks]
    with attach(model_of(model), POLICIES[policy], tier=EXACT) as handle:
        ours = read(model_of(model), handle.new_cache(), ids_of(), edges)
    return off(ours, reference(model, policy, groups(POLICIES[policy], edges)))


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("policy", POLICIES)
def test_equals_the_reference_at_every_position(policy, chunks):
    assert differs("grouped heads", policy, chunks) < 1e-5


@pytest.mark.parametrize("chunks", ["one call", "prefill, then token by token"])
@pytest.mark.parametrize("policy", ONE_OF_EACH)
@pytest.mark.parametrize("model", [model for model in MODELS if model != "grouped heads"])
def test_equals_the_reference_in_other_models(model, policy, chunks):
    assert differs(model, policy, chunks) < 1e-5


@pytest.mark.parametrize("chunks", ["one call", "uneven chunks", "token by token"])
@pytest.mark.parametrize("policy", ONE_OF_EACH)
def test_each_row_recalls_what_it_asks_for_padded_or_not(policy, chunks):
    model, edges, ids = model_of("grouped heads"), CHUNKS[chunks], ids_of(2)
    mask = torch.ones_like(ids)
    mask[1, :PAD] = 0
    with attach(model, POLICIES[policy], tier=EXACT) as handle:
        ours = read(model, handle.new_cache(), ids, edges, mask)
        alike = read(model, handle.new_cache(), ids, edges)
    for row, pad in enumerate((0, PAD)):
        theirs = reference("grouped heads", policy, groups(POLICIES[policy], edges, pad), row, pad)
        assert off(ours[row : row + 1, pad:], theirs) < 1e-5
    plain = reference("grouped heads", policy, groups(POLICIES[policy], edges), 1)
    assert off(alike[1:], plain) < 1e-5


@pytest.mark.parametrize("chunks", ["uneven chunks", "token by token"])
@pytest.mark.parametrize("policy", ONE_OF_EACH)
def test_a_frame_that_moves_changes_nothing(policy, chunks, monkeypatch):
    monkeypatch.setattr(layer_memory, "FRAME", 24)
    assert differs("grouped heads", policy, chunks) < 1e-5


@pytest.mark.parametrize("policy", ONE_OF_EACH)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_in_every_family_chunks_that_end_on_groups_make_no_difference(family, policy):
    model, size = tiny.build(family), POLICIES[policy].group
    with attach(model, POLICIES[policy], tier=EXACT) as handle:
        whole = read(model, handle.new_cache(), ids_of(), (0, LENGTH))
        pieces = read(model, handle.new_cache(), ids_of(), (0, *range(size, LENGTH, size), LENGTH))
    assert off(pieces, whole) < 1e-4


@pytest.mark.parametrize("only", ["", "v_proj", "q_proj"])
@pytest.mark.parametrize("policy", ONE_OF_EACH)
def test_gradients_flow_into_what_is_recalled_and_into_what_looks_at_it(policy, only):
    model = tiny.build("llama").double()
    weight = getattr(model.model.layers[0].self_attn, only or "v_proj").weight
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is weight or not only)

    def loss():
        with attach(model, POLICIES[policy], tier=EXACT) as handle:
            cache = tiny.cached(handle.new_cache())
            return model(ids_of(), **cache, use_cache=True).logits[0, :, 5].sum()

    loss().backward()
    found, step = float(weight.grad[0, 0]), 8e-3  # norms are computed in single precision
    with torch.no_grad():
        sides = []
        for side in (step, -2 * step):
            weight[0, 0] += side
            sides.append(float(loss()))
    assert found == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=2e-3)


def test_a_cache_that_was_read_into_without_gradients_goes_on_with_them():
    model = model_of("grouped heads")
    for policy in POLICIES.values():
        with attach(model, policy) as handle:
            cache = handle.new_cache()
            with torch.inference_mode():
                model(ids_of()[:, :30], **tiny.cached(cache), use_cache=True)
                model(ids_of()[:, 30:31], **tiny.cached(cache), use_cache=True)
            model(ids_of()[:, 31:], **tiny.cached(cache), use_cache=True).logits.sum().backward()


def test_what_was_taken_back_is_not_recalled():
    model, ids = model_of("grouped heads"), ids_of()
    policy = Recall(window=30, sinks=2, recalled=24, block=3, group=8)
    with attach(model, policy, tier=EXACT) as handle, torch.no_grad():
        cache, plain = handle.new_cache(), handle.new_cache()
        for each in (cache, plain):
            read(model, each, ids, (0, 25))
        with cache.provisional():
            read(model, cache, ids.flip(1), (0, 12))
        cache.rollback()
        ours, theirs = (read(model, each, ids, (25, 37, *range(38, LENGTH + 1))) for each in (cache, plain))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_what_is_still_recalled_when_it_is_coded_is_read_again(precision, monkeypatch):
    monkeypatch.setattr(tiers, "BLOCK", 4)
    model, ids = model_of("grouped heads"), ids_of()
    policy = Recall(window=14, sinks=1, recalled=8, block=2, group=4)
    with attach(model, policy, tier=Tier(precision=precision)) as handle:
        cache = handle.new_cache()
        read(model, cache, ids, (0, 20))
        for at in range(20, LENGTH):
            twin = cache.fork()
            assert torch.equal(*(read(model, each, ids, (at, at + 1)) for each in (cache, twin)))


def mutants(policy):
    for field in (
        "window",
        "sinks",
        "recalled",
        "block",
        "representatives",
        "votes",
        "radius",
        "layers",
        "steps",
        "probes",
        "lead",
        "momentum",
    ):
        value = getattr(policy, field, None)
        if value is None:
            continue
        for step in (-0.5, 0.4) if field == "momentum" else (-1, 1, getattr(policy, "block", 0)):
            try:
                mutant = dataclasses.replace(policy, **{field: value + step}).resolve(None)
            except ConfigurationError:
                continue
            if mutant != policy:
                yield field, mutant


@pytest.mark.parametrize("policy", ONE_OF_EACH)
def test_the_comparison_notices_other_constants(policy):
    model, right = model_of("grouped heads"), POLICIES[policy]
    seen = set()
    for field, mutant in mutants(right):
        with attach(model, mutant, tier=EXACT) as handle:
            chunks = CHUNKS["one call" if field == "probes" else "token by token"]  # a group is to differ
            ours = read(model, handle.new_cache(), ids_of(2)[:1], chunks)
        edges = groups(right, chunks)
        if off(ours, reference("grouped heads", policy, edges)) > 1e-4:
            seen.add(field)
    own = {
        "inf-llm": {"block", "representatives"},
        "re-attention": {"votes", "radius"},
        "recall": {"block", "layers", "steps", "probes", "lead", "momentum"},
        "quest": {"block", "recalled"},
        "infinite-hip": {"block", "recalled"},
    }
    assert {"window", "sinks"} | own[policy] <= seen


@pytest.mark.parametrize("policy", POLICIES)
def test_up_to_the_window_it_is_the_stock_model(policy):
    model, window = model_of("grouped heads"), POLICIES[policy].window
    ids = ids_of()[:, :window]
    with torch.no_grad():
        stock = model(ids).logits
    for edges in ((0, window), (0, 3, window), tuple(range(window + 1))):
        with attach(model, POLICIES[policy]) as handle:
            assert off(read(model, handle.new_cache(), ids, edges), stock) < 1e-5


@pytest.mark.parametrize("policy", ONE_OF_EACH)
def test_chunks_that_end_on_groups_make_no_difference(policy):
    model, size = model_of("grouped heads"), POLICIES[policy].group
    with attach(model, POLICIES[policy]) as handle:
        whole = read(model, handle.new_cache(), ids_of(), (0, LENGTH))
        pieces = read(model, handle.new_cache(), ids_of(), (0, *range(2 * size, LENGTH, size), LENGTH))
    assert torch.allclose(whole, pieces, atol=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize(
    ("policy", "tier"),
    [
        *itertools.product(ONE_OF_EACH, [Tier(), Tier("disk")]),
        ("inf-llm", Tier(precision="int8")),  # where choices are of the tier's keys, bytes change them
        ("quest", Tier(precision="int8")),
    ],
    ids=str,
)
def test_from_any_tier(policy, tier, monkeypatch):
    monkeypatch.setattr(tiers, "BLOCK", 4)
    model, found = model_of("grouped heads"), []
    for each in (EXACT, tier):
        with attach(model, POLICIES[policy], tier=each) as handle:
            found.append(read(model, handle.new_cache(), ids_of(), CHUNKS["prefill, then token by token"]))
    assert 0 < off(found[1], found[0]) < (0.2 if tier.precision == "int8" else 2e-2)


@pytest.mark.parametrize("policy", ONE_OF_EACH)
def test_copies_and_saved_states_go_on_bit_by_bit(policy, monkeypatch):
    monkeypatch.setattr(key_index, "SEGMENT", 64)
    model = model_of("grouped heads")
    ids = tiny.random_ids(2, 160)
    with attach(model, POLICIES[policy], tier="disk") as handle:
        cache = handle.new_cache()
        read(model, cache, ids, (0, 100, 133, *range(134, 141)))
        tensors, meta = cache.state()
        copies = [cache.fork(), handle.restore_cache(tensors, meta)]
        rows = cache.fork()
        rows.batch_select_indices(torch.tensor([1, 1, 0]))
        theirs = read(model, cache, ids, tuple(range(140, 161)))
        for twin in copies:
            assert torch.equal(read(model, twin, ids, tuple(range(140, 161))), theirs)
        picked = read(model, rows, ids[[1, 1, 0]], tuple(range(140, 161)))
        assert off(picked, theirs[[1, 1, 0]]) < 1e-5


@pytest.mark.thin
@pytest.mark.parametrize("read_first", [600, 700, 812], ids=["open", "closed", "two closed"])
@pytest.mark.parametrize("precision", ["float16", "int8"])
@pytest.mark.parametrize("policy", ["recall, single keys", "infinite-hip", "re-attention"])
def test_a_saved_state_goes_on_bit_by_bit_after_its_tier_forgot(policy, precision, read_first, monkeypatch):
    """Segments whose first tokens are gone keep their scales; restored, they are saved again."""
    monkeypatch.setattr(key_index, "SEGMENT", 512)
    model, ids = model_of("grouped heads"), tiny.random_ids(1, 1400)
    size = coding.coded_bytes(*[torch.empty(1, 2, tiers.BLOCK, 8)] * 2, tiers.BLOCK, precision)
    with attach(model, POLICIES[policy], tier=Tier(precision=precision, limit=2 * 3 * size)) as handle:
        cache = handle.new_cache()
        steps = tuple(range(0, read_first, 100))
        read(model, cache, ids, (*steps, read_first))
        assert cache.forgotten
        for stop in (read_first + 20, read_first + 300, read_first + 500):
            twin = handle.restore_cache(*cache.state())
            chunks = (cache.seen, cache.seen + 5, *range(cache.seen + 6, cache.seen + 12), stop)
            theirs = read(model, cache, ids, chunks)
            assert torch.equal(read(model, twin, ids, chunks), theirs)
            cache = twin


@pytest.mark.parametrize("policy", ["inf-llm", "quest", "infinite-hip", "recall, single keys"])
def test_accounts_count_what_is_known_of_blocks_and_what_was_made_ready(policy):
    model = model_of("grouped heads")
    with attach(model, POLICIES[policy]) as handle:
        cache = handle.new_cache()
        read(model, cache, ids_of(), (0, 30, *range(31, LENGTH)))
        memory = next(iter(cache.memories.values()))
        held = [memory.keys, memory.values, memory.raw, memory.sink_keys, memory.sink_values]
        ready = memory.ready
        some = ready._pool if isinstance(ready, ReadyPool) else ready._held
        made = {x.untyped_storage().data_ptr(): x for x in (*some, *ready._placed[:2])}
        assert len(made) <= (4 if isinstance(ready, ReadyPool) else 3), "values that are held are those shown"
        held += [*memory.index.values(), *made.values()]
        held += itertools.chain(*ready._left.values())
        assert memory.nbytes()["window"] == sum(x.nbytes for x in held if x is not None)
        assert (cache.forgotten, cache.recallable) == (0, LENGTH - 1 - POLICIES[policy].window)


def test_what_was_wanted_shortly_before_is_not_read_again():
    """Of blocks that come and go only those are read that are new; no more are kept than are shown."""
    model, policy = model_of("grouped heads"), Recall(window=20, sinks=2, recalled=6, block=2, group=4)
    with attach(model, policy, tier=EXACT) as handle:
        cache = handle.new_cache()
        read(model, cache, ids_of(), (0, 30))
        memory = next(iter(cache.memories.values()))
        view = LayerView(memory, LayerCall(0, Rotation(None, "halves")), memory.seen, None)
        wanted = [[(2, 4), (4, 6), (6, 8)]], [[(2, 4), (8, 10), (12, 14)]], [[(4, 6), (6, 8), (8, 10)]]
        seen: list[tuple[int, int]] = []
        view.middle = lambda begin, stop: seen.append((begin, stop)) or LayerView.middle(view, begin, stop)
        memory.ready = ReadyTokens()
        for spans in (*wanted, *wanted):
            ready = memory.ready.fetch([spans], view)
            true = [
                torch.cat(x, 2) for x in zip(*(LayerView.middle(view, *s) for s in spans[0]), strict=True)
            ]
            assert all(torch.equal(a, b) for a, b in zip(ready, true, strict=True))
            assert sum(stop - begin for _, _, (begin, stop) in memory.ready._left) <= 6
    assert len(seen) == len(set(seen)) == 5, "each block once: five blocks, six of them fit"


def test_of_tokens_written_one_by_one_each_eighth_asks(monkeypatch):
    """The first of them does, whoever asked before; tokens read together between begin anew."""
    model, policy = model_of("grouped heads"), dataclasses.replace(POLICIES["recall"], layers=1, steps=8)
    asked: list[int] = []
    with attach(model, policy, tier=EXACT) as handle:
        cache = handle.new_cache()
        original = Recall.worth
        monkeypatch.setattr(
            Recall, "worth", lambda self, *rest: asked.append(rest[2].first) or original(self, *rest)
        )
        read(model, cache, ids_of(), (0, 26, *range(27, 37), 39, *range(40, LENGTH + 1)))
    assert sorted(set(asked)) == [24, 26, 34, 36, 39], "at 16 all blocks are shown"
    assert len(asked) == len(set(asked)) * len(cache.memories), "each layer for itself"


@pytest.mark.parametrize("precision", ["exact", "int8"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_between_askings_written_tokens_take_the_shortest_way_and_see_the_same(
    family, precision, monkeypatch
):
    """Padded rows, and blocks of the tier that become whole in between, included."""
    monkeypatch.setattr(tiers, "BLOCK", 4)
    model, ids = tiny.build(family), tiny.random_ids(2, 60)
    policy = Recall(window=16, sinks=2, recalled=6, block=3, group=8, steps=4)
    mask = torch.ones_like(ids)
    mask[1, :PAD] = 0
    taken: list[int] = []
    with attach(model, policy, tier=Tier(precision=precision)) as handle:
        original = StandingStep.attend
        monkeypatch.setattr(
            StandingStep, "attend", lambda *given, **rest: taken.append(1) or original(*given, **rest)
        )
        ours = read(model, handle.new_cache(), ids, (0, 28, *range(29, 61)), mask)
        recalling = sum(memory.tier is not None for memory in handle.new_cache().memories.values())
        assert len(taken) == recalling * (32 - 8 - 8), "each fourth asks, and before it a block becomes whole"
        monkeypatch.setattr(forward, "standing_step", lambda *given: None)
        theirs = read(model, handle.new_cache(), ids, (0, 28, *range(29, 61)), mask)
    assert torch.equal(ours, theirs)


def test_heads_that_choose_for_themselves_have_their_own_ready_and_read_it_once():
    model, policy = model_of("grouped heads"), Quest(window=20, sinks=2, recalled=6, block=2, group=4)
    with attach(model, policy, tier=EXACT) as handle:
        cache = handle.new_cache()
        read(model, cache, ids_of(2), (0, 30))
        memory = next(iter(cache.memories.values()))
        view = LayerView(memory, LayerCall(0, Rotation(None, "halves")), memory.seen, None)
        together, apart = [[(2, 4), (4, 6)]], [[(2, 4), (6, 8)], [(6, 8), (10, 12)]]
        other = [[(4, 6), (6, 8)], [(2, 4), (6, 8)]]
        seen: list[tuple[int, int]] = []
        view.middle = lambda begin, stop: seen.append((begin, stop)) or LayerView.middle(view, begin, stop)
        memory.ready = ReadyTokens()
        steps = (
            ([together, apart], 5),  # each row of its own: two spans, and three of which two heads want one
            ([together, other], 2),  # of the second row (4, 6), and (2, 4) for its second head
            ([apart, apart], 3),  # the first row's heads had all together before
            ([together, [[]]], 3),  # a row that asks for nothing
        )
        for chosen, reads in steps:
            seen.clear()
            keys, values = memory.ready.fetch(chosen, view)
            assert len(seen) == reads
            for row, head in itertools.product(range(2), range(2)):
                spans = chosen[row][head if len(chosen[row]) > 1 else 0]
                for at, (begin, stop) in enumerate(spans):
                    true = LayerView.middle(view, begin, stop)
                    for found, which in zip((keys, values), true, strict=True):
                        assert torch.equal(found[row, head, 2 * at : 2 * at + 2], which[row, head])
            wanted = sum(2 * len(spans) * (1 if len(some) > 1 else 2) for some in chosen for spans in some)
            left = sum(keys.shape[0] * keys.shape[1] for keys, _ in memory.ready._left.values())
            assert left <= wanted


def test_heads_choose_differently_in_what_is_compared():
    """Otherwise the matrix above could not tell heads that choose for themselves."""
    model = model_of("grouped heads")
    with attach(model, POLICIES["quest"]) as handle:
        cache = handle.new_cache()
        read(model, cache, ids_of(), (0, LENGTH))
        chosen = [memory.ready._chosen[0] for memory in cache.memories.values()]
    assert any(len(choice) == 2 and choice[0] != choice[1] for choice in chosen)


def test_a_limited_tier_forgets_the_oldest_and_recalls_the_rest():
    model = model_of("grouped heads")
    ids = tiny.random_ids(1, 700)
    for policy in ONE_OF_EACH:
        with attach(model, POLICIES[policy], tier=Tier(limit=2**15)) as handle:
            cache = handle.new_cache()
            logits = read(model, cache, ids, (0, 300, 650, *range(651, 701)))
            assert torch.isfinite(logits).all()
            assert 0 < cache.forgotten < 700 - POLICIES[policy].window


def test_a_tier_that_fails_leaves_what_is_in_the_window():
    model = model_of("grouped heads")
    ids = tiny.random_ids(1, 400)
    for policy in ONE_OF_EACH:
        with attach(model, POLICIES[policy], tier="disk") as handle:
            cache = handle.new_cache()
            read(model, cache, ids, (0, 399))
            for memory in cache.memories.values():
                memory.tier._shelf.get = _fails
                memory.ready = ReadyTokens()
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                assert torch.isfinite(read(model, cache, ids, (399, 400))).all()
            assert any("are forgotten" in str(warning.message) for warning in told)


def _fails(blocks):
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("policy", "name"),
    [("inf-llm", "InfLLM"), ("quest", "Quest"), ("infinite-hip", "InfiniteHiP")],
)
def test_tokens_cannot_be_taken_back_where_notes_are_taken(policy, name):
    with attach(model_of("grouped heads"), POLICIES[policy]) as handle:
        cache = handle.new_cache()
        with pytest.raises(UnsupportedUseError, match=f"{name} takes note of"), cache.provisional():
            pass


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: InfLLM(window=300).resolve(None), "cannot hold 128 sinks, 0 recalled tokens"),
        (lambda: InfLLM(window=600, recalled=400).resolve(None), "use a larger window, fewer sinks"),
        (lambda: ReAttention(window=64).resolve(None), "at least 33"),
        (lambda: InfLLM().resolve(None), r"pass InfLLM\(window=...\)"),
        (lambda: InfLLM(block=0), "block must be a whole number of at least 1"),
        (lambda: InfLLM(recalled=0), "recalled must be a whole number"),
        (lambda: Recall(window=200, recalled=100).resolve(None), "use 96 or 128"),
        (lambda: Recall(block=0), "Recall: block must be a whole number"),
        (lambda: Recall(steps=0), "Recall: steps must be a whole number of at least 1"),
        (lambda: Recall(lead=-1), "Recall: lead must be a whole number of at least 0"),
        (lambda: Recall(block=32, lead=5), "lead=5 must divide a block of 32 tokens"),
        (lambda: Recall(momentum=1.0), "Recall: momentum must be from 0 to below 1, not 1.0"),
        (lambda: Recall(momentum=-0.5), "Recall: momentum must be from 0 to below 1"),
        (lambda: Recall(probes=0), "Recall: probes must be a whole number of at least 1"),
        (lambda: Recall(distance=-1), "Recall: distance must be a whole number of at least 0"),
        (lambda: Recall(window=18).resolve(None), "cannot hold 16 sinks, 0 recalled tokens"),
        (lambda: Recall(window=8).resolve(None), "a window of 8 cannot hold 16 sinks, 0 recalled tokens"),
        (lambda: Recall(window=10**23), "Recall: window can be 1,099,511,627,776 at most"),
        (lambda: Quest(window=200, recalled=100).resolve(None), "use 96 or 112"),
        (lambda: Quest(block=1), "Quest: block must be a whole number of at least 2"),
        (lambda: InfiniteHiP(window=200, recalled=100).resolve(None), "use 96 or 104"),
        (lambda: InfiniteHiP(window=24).resolve(None), "cannot hold 16 sinks, 0 recalled tokens"),
        (lambda: InfiniteHiP(coarse=200), "coarse=200 must be a power of two, to be halved: use 128 or 256"),
        (lambda: InfiniteHiP(block=64), "the largest first"),
        (lambda: InfiniteHiP(medium=0), "medium must be a whole number of at least 1"),
        (lambda: InfiniteHiP(block_steps=0), "InfiniteHiP: block_steps must be a whole number"),
        (lambda: ReAttention(votes=0), "votes must be a whole number"),
        (lambda: ReAttention(radius=-1), "radius must be a whole number"),
        (lambda: ReAttention(group=0), "group must be a whole number"),
        (lambda: ReAttention(sinks=-1), "sinks must be a whole number"),
    ],
)
def test_budgets_that_cannot_work_are_refused(make, said):
    with pytest.raises(ConfigurationError, match=said):
        make()


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (8192, (32, 2720, 512)),
        (2048, (32, 672, 512)),
        (200, (32, 32, 151)),
        (64, (16, 16, 31)),
        (20, (1, 1, 2)),
    ],
)
def test_small_windows_have_smaller_blocks(window, expected):
    resolved = Recall().resolve(window)
    assert (resolved.block, resolved.recalled, resolved.distance) == expected
    assert resolved.lead == resolved.block // 4
    assert resolved.resolve(None) == resolved
    assert Recall(recalled=8, window=64).resolve(None).block == 8


def test_more_sinks_leave_as_much_for_what_is_recalled_as_for_the_latest():
    few = Recall(window=528, recalled=256).resolve(None)
    many = with_sinks(few, 272)
    assert (many.sinks, many.recalled, many.shape()[2]) == (272, 128, 128)
    assert with_sinks(few, 10) == few
    with pytest.raises(ConfigurationError, match="cannot hold 500 sinks, 32 recalled"):
        with_sinks(few, 500)


def test_the_defaults_are_the_papers_shares():
    assert InfLLM(window=128 + 2048 + 4096).resolve(None).recalled == 2048 - 2048 % 128
    assert InfiniteHiP(sinks=256, window=256 + 2048 + 1024).resolve(None).recalled == 2048
    assert ReAttention(window=32 + 4191 + 4191).resolve(None).recalled == 127 * 33
