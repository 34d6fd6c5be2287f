"""SelfExtend, DualChunk and scaled positions equal their definitions: in chunks, rows, copies, branches."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools

import pytest
import torch

import tests.tiny as tiny
from everlong.attention import (
    DualChunk,
    FullAttention,
    LinearScaling,
    NTKScaling,
    SelfExtend,
    YaRN,
    attach,
    layer_memory,
    make_policy,
)
from everlong.attention.branches import Branches
from everlong.errors import ConfigurationError, UnsupportedUseError
from tests.attention.test_exactness import MODELS, largest_difference, model_of, ours
from tests.reference.attention import ReferenceSpec
from tests.reference.model import reference_logits

LENGTH, PAD = 40, 5
POLICIES = {
    "self-extend": SelfExtend(neighbours=9, group_size=3),
    "self-extend, even groups": SelfExtend(neighbours=8, group_size=4),
    "self-extend, one neighbour": SelfExtend(neighbours=1, group_size=2),
    "dual-chunk": DualChunk(chunk=9, positions=13),
    "dual-chunk, next to no room": DualChunk(chunk=4, positions=5),
    "dual-chunk, much room": DualChunk(chunk=7, positions=30),
}
FEW = ("self-extend", "dual-chunk")
CHUNKS = {
    "one call": (0, LENGTH),
    "uneven chunks": (0, 2, 3, 9, 10, 11, 17, 29, 31, LENGTH),
    "token by token": tuple(range(LENGTH + 1)),
    "prefill, then token by token": (0, 22, *range(23, LENGTH + 1)),
}
KINDS = {SelfExtend: "self-extend", DualChunk: "dual-chunk", FullAttention: "full"}
SCALED = {
    "linear": (LinearScaling(factor=3.0), {"rope_type": "linear", "factor": 3.0}),
    "yarn": (
        YaRN(factor=4.0),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": tiny.TRAINING_LENGTH},
    ),
    "yarn, other betas": (
        YaRN(factor=2.5, beta_fast=4, beta_slow=0.5),
        {
            **{"rope_type": "yarn", "factor": 2.5, "beta_fast": 4, "beta_slow": 0.5},
            "original_max_position_embeddings": tiny.TRAINING_LENGTH,
        },
    ),
    "ntk": (NTKScaling(factor=2.0), {"rope_type": "dynamic", "factor": 2.0}),
}


def spec_of(policy):
    known = {field.name for field in dataclasses.fields(ReferenceSpec)}
    options = dataclasses.asdict(policy.resolve(tiny.TRAINING_LENGTH))
    return ReferenceSpec(kind=KINDS[type(policy)], **{k: v for k, v in options.items() if k in known})


@functools.cache
def inputs():
    ids = tiny.random_ids(2, LENGTH, seed=2)
    mask = torch.ones_like(ids)
    mask[1, :PAD] = 0
    return ids, mask


@functools.cache
def reference(model, policy):
    ids, mask = inputs()
    return reference_logits(model_of(model), ids, spec_of(POLICIES[policy]), attention_mask=mask)


@torch.no_grad()
def read(model, cache, ids, edges, mask=None):
    pieces = [
        model(
            ids[:, a:b],
            attention_mask=None if mask is None else mask[:, :b],
            **tiny.cached(cache),
            use_cache=True,
        ).logits
        for a, b in itertools.pairwise(edges)
    ]
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("policy", POLICIES)
def test_equals_the_reference_at_every_position(policy, chunks):
    ids, mask = inputs()
    for rows in (slice(0, 1), slice(0, 2)):  # without padding, and with
        logits = ours(model_of("grouped heads"), POLICIES[policy], CHUNKS[chunks], ids[rows], mask[rows])
        theirs = reference("grouped heads", policy)[rows]
        assert largest_difference(logits, theirs, mask[rows]) < 1e-5


@pytest.mark.parametrize("chunks", ["one call", "prefill, then token by token"])
@pytest.mark.parametrize("policy", FEW)
@pytest.mark.parametrize("model", [model for model in MODELS if model != "grouped heads"])
def test_equals_the_reference_in_other_models(model, policy, chunks):
    ids, mask = inputs()
    logits = ours(model_of(model), POLICIES[policy], CHUNKS[chunks], ids, mask)
    assert largest_difference(logits, reference(model, policy), mask) < 1e-5
    full = ours(model_of(model), FullAttention(), (0, LENGTH), ids, mask)
    assert largest_difference(full, logits, mask) > 1e-3


@pytest.mark.parametrize("policy", FEW)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_in_every_family_chunks_make_no_difference(family, policy):
    model, (ids, mask) = tiny.build(family), inputs()
    with attach(model, POLICIES[policy]) as handle:
        whole = read(model, handle.new_cache(), ids, (0, LENGTH), mask)
        pieces = read(model, handle.new_cache(), ids, (0, 8, 22, 23, 24, 25, LENGTH), mask)
    assert largest_difference(pieces, whole, mask) < 2e-5


@pytest.mark.parametrize(
    ("mutant", "policy"),
    [
        (SelfExtend(neighbours=10, group_size=3), "self-extend"),
        (SelfExtend(neighbours=9, group_size=4), "self-extend"),
        (DualChunk(chunk=10, positions=13), "dual-chunk"),
        (DualChunk(chunk=9, positions=12), "dual-chunk"),
    ],
)
def test_the_comparison_notices_every_mutation(mutant, policy):
    ids, mask = inputs()
    for chunks in ("one call", "token by token"):
        logits = ours(model_of("grouped heads"), mutant, CHUNKS[chunks], ids, mask)
        assert largest_difference(logits, reference("grouped heads", policy), mask) > 1e-4


@pytest.mark.parametrize(
    "policy", [SelfExtend(neighbours=LENGTH), DualChunk(chunk=LENGTH, positions=LENGTH + 1)]
)
@torch.no_grad()
def test_equals_stock_until_its_form_changes(policy):
    model, (ids, mask) = model_of("grouped heads"), inputs()
    stock = model(ids, attention_mask=mask).logits
    for edges in CHUNKS.values():
        assert largest_difference(ours(model, policy, edges, ids, mask), stock, mask) < 1e-5


@pytest.mark.parametrize("policy", FEW)
@torch.no_grad()
def test_a_stream_may_begin_anywhere_and_its_frame_may_move(policy, monkeypatch):
    monkeypatch.setattr(layer_memory, "FRAME", 24)
    model, (ids, _) = model_of("grouped heads"), inputs()
    with attach(model, POLICIES[policy]) as handle:
        for edges in CHUNKS.values():
            logits = read(model, handle.new_cache(offset=200_000_000), ids[:1], edges)
            theirs = reference("grouped heads", policy)[:1]
            assert largest_difference(logits, theirs, torch.ones(1, LENGTH)) < 1e-5


@pytest.mark.parametrize("policy", FEW)
def test_copies_saved_states_and_other_rows_go_on_alike(policy):
    model, (ids, mask) = model_of("grouped heads"), inputs()
    with attach(model, POLICIES[policy]) as handle:
        for begin, edges in itertools.product((6, 23), ("one call", "token by token")):
            rest = (0, LENGTH - begin) if edges == "one call" else tuple(range(LENGTH - begin + 1))
            cache = handle.new_cache()
            read(model, cache, ids[:, :begin], (0, begin), mask)
            restored = handle.restore_cache(*cache.state())
            twin, swapped = cache.fork(), copy.deepcopy(cache)
            swapped.batch_select_indices(torch.tensor([1, 0, 1]))
            for other in (cache, restored, twin):
                logits = go_on(model, other, ids, mask, begin, rest)
                theirs = reference("grouped heads", policy)[:, begin:]
                assert largest_difference(logits, theirs, torch.ones_like(ids[:, begin:])) < 1e-5
            picked = torch.tensor([1, 0, 1])
            logits = go_on(model, swapped, ids[picked], mask[picked], begin, rest)
            assert largest_difference(logits, theirs[picked], torch.ones_like(ids[picked, begin:])) < 1e-5


@torch.no_grad()
def go_on(model, cache, ids, mask, begin, edges):
    pieces = [
        model(
            ids[:, begin + a : begin + b],
            attention_mask=mask[:, : begin + b],
            **tiny.cached(cache),
            use_cache=True,
        ).logits
        for a, b in itertools.pairwise(edges)
    ]
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("begin", [6, 8, 20])
@pytest.mark.parametrize("policy", FEW)
def test_tokens_are_taken_back_and_kept_in_part(policy, begin):
    model, (ids, mask) = model_of("grouped heads"), inputs()
    theirs = reference("grouped heads", policy)
    with attach(model, POLICIES[policy]) as handle:
        cache = handle.new_cache()
        read(model, cache, ids[:, :begin], (0, begin), mask)
        with cache.provisional():
            guessed = go_on(model, cache, ids.roll(1, 1), mask, begin, (0, 6))
        assert largest_difference(guessed, theirs[:, begin : begin + 6], torch.ones_like(ids[:, :6])) > 1e-4
        cache.rollback()
        with cache.provisional():
            ahead = go_on(model, cache, ids, mask, begin, (0, 1, 4))
        cache.commit([0, 1, 2])
        rest = go_on(model, cache, ids, mask, begin + 3, range(LENGTH - begin - 2))
        logits = torch.cat((ahead[:, :3], rest), 1)
        assert largest_difference(logits, theirs[:, begin:], torch.ones_like(ids[:, begin:])) < 1e-5


@torch.no_grad()
def test_self_extend_takes_branches_shorter_than_its_neighbourhood_and_dual_chunk_none():
    model, (ids, _) = model_of("grouped heads"), inputs()
    tree, policy = Branches([-1, 0, 1, 0, 3]), POLICIES["self-extend"]
    for begin in (5, 20):
        with attach(model, policy) as handle:
            cache = handle.new_cache()
            read(model, cache, ids[:1, :begin], (0, begin))
            new = torch.tensor([[5, 6, 7, 8, 9]])
            with cache.provisional(tree):
                logits = model(new, **tiny.cached(cache), use_cache=True).logits
            for way in ([0, 1, 2], [0, 3, 4]):
                text = torch.cat((ids[:1, :begin], new[:, way]), 1)
                theirs = reference_logits(model, text, spec_of(policy))[:, begin:]
                assert torch.allclose(logits[:, way], theirs, atol=1e-4)
            cache.commit([0, 3, 4])
            text = torch.cat((ids[:1, :begin], new[:, [0, 3, 4]], ids[:1, begin:]), 1)
            rest = read(model, cache, ids[:1, begin:], range(LENGTH - begin + 1))
            theirs = reference_logits(model, text, spec_of(policy))[:, begin + 3 :]
            assert torch.allclose(rest, theirs, atol=1e-4)
            assert not cache.takes_branches(9) and cache.takes_branches(8)
    with attach(model, POLICIES["dual-chunk"]) as handle:
        cache = handle.new_cache()
        with (
            pytest.raises(UnsupportedUseError, match="DualChunk does not take tokens"),
            cache.provisional(tree),
        ):
            pass


@pytest.mark.parametrize("policy", FEW)
def test_gradients_are_the_slopes_of_what_they_belong_to(policy):
    model, (ids, mask) = copy.deepcopy(model_of("grouped heads")).double(), inputs()
    given = model.get_input_embeddings()(ids).detach()
    at, step = (1, 30, 3), 1e-3  # norms are computed in float32

    def measure(embeds, edges):
        with attach(model, POLICIES[policy]) as handle:
            cache = handle.new_cache()
            for a, b in itertools.pairwise(edges):
                logits = model(
                    inputs_embeds=embeds[:, a:b],
                    attention_mask=mask[:, :b],
                    **tiny.cached(cache),
                    use_cache=True,
                ).logits
        return logits[:, -1].logsumexp(-1).sum()

    with torch.no_grad():
        moved = [given.clone(), given.clone()]
        moved[0][at] += step
        moved[1][at] -= step
        up, down = (float(measure(embeds, (0, LENGTH))) for embeds in moved)
    for edges in ((0, LENGTH), (0, 25, LENGTH)):
        embeds = given.clone().requires_grad_()
        measure(embeds, edges).backward()
        assert abs(float(embeds.grad[at]) - (up - down) / (2 * step)) < 2e-3


@pytest.mark.parametrize("policy", POLICIES)
def test_accounts_say_that_all_is_kept(policy):
    model, (ids, _) = model_of("grouped heads"), inputs()
    with attach(model, POLICIES[policy]) as handle:
        cache = handle.new_cache()
        read(model, cache, ids, CHUNKS["uneven chunks"])
        assert (cache.seen, cache.kept, cache.recallable, cache.forgotten) == (LENGTH, LENGTH, 0, 0)
        held = [
            x
            for memory in cache.memories.values()
            for x in vars(memory).values()
            if isinstance(x, torch.Tensor)
        ]
        assert cache.bytes() == {"window": sum(x.nbytes for x in held), "ram": 0, "disk": 0}
        tensors, _ = cache.state()
        exact = sum(x.nbytes for x in tensors.values())
        assert cache.bytes_at(LENGTH)["window"] == exact


# --- scaled positions ------------------------------------------------------------------------------


def configured(family, parameters, **overrides):
    """Return a stock model of the family whose configuration names a scaling."""
    plain = tiny.build(family, **overrides).config.rope_parameters
    if "full_attention" in plain:
        tables = plain | {"full_attention": plain["full_attention"] | parameters}
    else:
        tables = plain | parameters
    return tiny.build(family, **overrides | {"rope_parameters": tables})


@pytest.mark.parametrize("family", ["llama", "phi", "gemma3_text", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("name", SCALED)
@torch.no_grad()
def test_scaling_equals_a_stock_model_configured_so(name, family):
    policy, parameters = SCALED[name]
    theirs = configured(family, parameters)
    ids = tiny.random_ids(2, 3 * tiny.TRAINING_LENGTH // 2)
    mask = torch.ones_like(ids)
    mask[1, :PAD] = 0
    stock = theirs(ids, attention_mask=mask).logits
    model = tiny.build(family)
    before = model(ids[:, :LENGTH]).logits
    length = ids.shape[1]
    pieces = (0, 7, 50, length - 3, length - 2, length - 1, length)
    for edges in [(0, length)] if name == "ntk" else [(0, length), pieces]:
        assert largest_difference(ours(model, policy, edges, ids, mask), stock, mask) < 1e-4
    assert torch.equal(model(ids[:, :LENGTH]).logits, before)
    unscaled = model(ids, attention_mask=mask).logits
    assert largest_difference(unscaled, stock, mask) > 1e-3


@torch.no_grad()
def test_ntk_is_the_table_of_what_was_read_so_far_and_of_one_length_where_that_is_named():
    model, ids = model_of("grouped heads"), tiny.random_ids(1, 100)
    mask = torch.ones_like(ids)
    assert torch.equal(
        ours(model, NTKScaling(), (0, 60), ids, mask), ours(model, FullAttention(), (0, 60), ids, mask)
    )
    edges = (0, 50, 90, *range(91, 101))
    whole = ours(model, NTKScaling(), (0, 100), ids, mask)
    named = ours(model, NTKScaling(length=100), edges, ids, mask)
    assert largest_difference(named, whole, mask) < 1e-5
    first = ours(model, NTKScaling(), edges, ids, mask)
    assert largest_difference(first[:, :50], whole[:, :50], mask[:, :50]) > 1e-3
    # In the first layer, keys that were rotated again and again are those of one table.
    with attach(model, NTKScaling()) as handle:
        caches = [handle.new_cache(), handle.new_cache()]
        for cache, steps in zip(caches, (edges, (0, 100)), strict=True):
            read(model, cache, ids, steps)
        keys = [cache.memories[0].keys[:, :, :100] for cache in caches]
        assert torch.allclose(*keys, atol=1e-5)
        assert "depend" in handle.why_apart(caches)


def test_a_scaled_stream_is_saved_and_restored():
    model, (ids, mask) = model_of("grouped heads"), inputs()
    for policy in (LinearScaling(), YaRN(), NTKScaling(length=80), NTKScaling()):
        with attach(model, policy) as handle:
            cache = handle.new_cache()
            read(model, cache, ids[:, :20], (0, 20), mask)
            again = handle.restore_cache(*cache.state())
            assert torch.equal(
                *(go_on(model, one, ids, mask, 20, (0, 3, 4, 5, 20)) for one in (cache, again))
            )


def test_a_model_that_is_scaled_already_refuses_to_be_scaled():
    for policy in (LinearScaling(), NTKScaling(), YaRN()):
        with pytest.raises(UnsupportedUseError, match=r"scaled by its configuration already \(yarn\)"):
            attach(model_of("yarn"), policy)
    with (
        attach(model_of("yarn"), FullAttention()) as handle,
        pytest.raises(UnsupportedUseError, match="already"),
    ):
        handle.new_cache(YaRN())
    with attach(model_of("yarn"), FullAttention()):  # nothing was left on it
        pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelfExtend(neighbours=0), "SelfExtend: neighbours must be a whole number of at least 1"),
        (lambda: SelfExtend(group_size=0), "SelfExtend: group_size must be"),
        (lambda: DualChunk(chunk=0), "DualChunk: chunk must be"),
        (lambda: DualChunk(chunk=8, positions=8), "use chunk=6 or less"),
        (lambda: DualChunk(chunk=64).resolve(64), "use chunk=48 or less"),
        (lambda: DualChunk().resolve(None), r"pass DualChunk\(positions=...\)"),
        (lambda: LinearScaling(factor=0.5), "LinearScaling: factor must be a number of at least 1, not 0.5"),
        (lambda: YaRN(factor="four"), "YaRN: factor must be a number"),
        (lambda: YaRN(beta_fast=1, beta_slow=2), "beta_fast=1 must be above beta_slow=2"),
        (lambda: NTKScaling(length=0), "length must be a whole number"),
    ],
)
def test_values_that_cannot_work_are_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_defaults_are_the_papers():
    assert SelfExtend().resolve(8192) == SelfExtend(neighbours=1024, group_size=8)
    assert SelfExtend().resolve(512) == SelfExtend(neighbours=256)
    assert DualChunk().resolve(8192) == DualChunk(chunk=6144, positions=8192)
    assert make_policy("yarn", {"factor": "4"}) == YaRN(factor=4)
    assert make_policy("linear") == LinearScaling(factor=4.0)
    assert make_policy("ntk", {"length": "16384"}) == NTKScaling(length=16384)
