"""Every window policy equals the brute-force reference: in one call, in chunks, token by token, padded."""

import dataclasses
import functools

import pytest
import torch

import tests.tiny as tiny
from everlong.attention import FullAttention, LMInfinite, StreamingLLM, attach, layer_memory
from tests.reference.attention import ReferenceSpec
from tests.reference.model import reference_logits

W, G = 10, 3
LENGTH = 3 * W
PAD = 4

MODELS = {
    "grouped heads": ("llama", {}),
    "full heads": ("llama", {"num_key_value_heads": 4}),
    "partial rotary": ("phi", {}),
    "yarn": ("llama", tiny.YARN),
    "local layers": ("gemma3_text", {}),
}
POLICIES = {
    "lm-infinite": LMInfinite(window=W, sinks=G),
    "the authors' ceiling": LMInfinite(window=W, sinks=G, ceiling=W - G),
    "ceiling inside the local part": LMInfinite(window=W, sinks=G, ceiling=4),
    "ceiling above the window": LMInfinite(window=W, sinks=G, ceiling=W + 5),
    "no ceiling": LMInfinite(window=W, sinks=G, ceiling=None),
    "no sinks": LMInfinite(window=W, sinks=0),
    "top_k": LMInfinite(window=W, sinks=G, top_k=2, top_k_layers=1),
    "top_k, short ceiling": LMInfinite(
        window=W, sinks=G, ceiling=4, top_k=2, top_k_layers=1, top_k_distance=3
    ),
    "streaming-llm": StreamingLLM(window=W, sinks=G),
    "streaming-llm without sinks": StreamingLLM(window=W, sinks=0),
    "full with a ceiling": FullAttention(ceiling=6),
}
CHUNKS = {
    "one call": (0, LENGTH),
    "uneven chunks": (0, 2, 3, 9, 10, 11, 17, 29, LENGTH),
    "chunks longer than the window": (0, 13, 26, LENGTH),
    "token by token": tuple(range(LENGTH + 1)),
    "prefill, then token by token": (0, 12, *range(13, LENGTH + 1)),
}


@functools.cache
def model_of(name):
    family, overrides = MODELS[name]
    return tiny.build(family, **overrides)


@functools.cache
def inputs():
    ids = torch.randint(3, tiny.VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :PAD] = 0
    return ids, mask


def spec_of(policy):
    resolved = dataclasses.asdict(policy.resolve(tiny.TRAINING_LENGTH))
    known = {field.name for field in dataclasses.fields(ReferenceSpec)}
    kind = {LMInfinite: "lm-infinite", StreamingLLM: "streaming-llm", FullAttention: "full"}[type(policy)]
    return ReferenceSpec(kind=kind, **{key: value for key, value in resolved.items() if key in known})


@functools.cache
def reference(model_name, policy_name):
    ids, mask = inputs()
    return reference_logits(model_of(model_name), ids, spec_of(POLICIES[policy_name]), attention_mask=mask)


@torch.no_grad()
def ours(model, policy, edges, ids, mask):
    with attach(model, policy) as handle:
        cache = handle.new_cache()
        pieces = [
            model(ids[:, a:b], attention_mask=mask[:, :b], **tiny.cached(cache), use_cache=True).logits
            for a, b in zip(edges, edges[1:], strict=False)
        ]
    return torch.cat(pieces, dim=1)


def largest_difference(ours, theirs, mask):
    real = mask[:, : ours.shape[1]].bool()
    return float(
        (ours[real] - theirs[:, : ours.shape[1]][real]).abs().max() / theirs[mask.bool()].abs().max()
    )


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("model", MODELS)
def test_equals_the_reference_at_every_position(model, policy, chunks):
    ids, mask = inputs()
    logits = ours(model_of(model), POLICIES[policy], CHUNKS[chunks], ids, mask)
    assert largest_difference(logits, reference(model, policy), mask) < 1e-5


@pytest.mark.parametrize("length", [W - 1, W, W + 1, W + G, 3 * W])
@pytest.mark.parametrize("policy", POLICIES)
def test_equals_the_reference_at_every_length(policy, length):
    ids, mask = inputs()
    logits = ours(model_of("grouped heads"), POLICIES[policy], (0, length), ids[:, :length], mask[:, :length])
    assert largest_difference(logits, reference("grouped heads", policy), mask) < 1e-5


def mutations(policy):
    for field, steps in (
        ("window", (-1, 1)),
        ("sinks", (-1, 1)),
        ("ceiling", (-1, 1)),
        ("top_k_distance", (1,)),
    ):
        value = getattr(policy.resolve(tiny.TRAINING_LENGTH), field, None)
        if not isinstance(value, int) or (field == "top_k_distance" and not policy.top_k):
            continue
        for step in steps:
            # Without sinks nothing is ever as far as a ceiling outside the local part.
            unseen = field == "ceiling" and not policy.sinks if hasattr(policy, "sinks") else False
            if value + step >= 0 and not unseen:
                yield dataclasses.replace(policy.resolve(tiny.TRAINING_LENGTH), **{field: value + step})


@pytest.mark.parametrize("policy", POLICIES)
def test_the_comparison_notices_every_mutation(policy):
    ids, mask = inputs()
    mutants = list(mutations(POLICIES[policy]))
    assert mutants
    for mutant in mutants:
        for chunks in ("one call", "token by token"):
            logits = ours(model_of("grouped heads"), mutant, CHUNKS[chunks], ids, mask)
            assert largest_difference(logits, reference("grouped heads", policy), mask) > 1e-4, mutant


@torch.no_grad()
def test_the_comparison_notices_one_swapped_ring_slot():
    ids, _ = inputs()
    model, mask = model_of("grouped heads"), torch.ones_like(ids[:1])
    with attach(model, POLICIES["lm-infinite"]) as handle:
        cache = handle.new_cache()
        model(ids[:1, :-4], **tiny.cached(cache), use_cache=True)
        keys = cache.memories[0].keys
        keys[:, :, [G, G + 1]] = keys[:, :, [G + 1, G]]
        tail = torch.cat(
            [model(ids[:1, at : at + 1], **tiny.cached(cache)).logits for at in range(-4, -1)], dim=1
        )
    theirs = reference("grouped heads", "lm-infinite")[:1, -4:-1]
    assert largest_difference(tail, theirs, mask[:, :3]) > 1e-4


@pytest.mark.parametrize("policy", ["lm-infinite", "streaming-llm", "top_k"])
@torch.no_grad()
def test_position_two_hundred_million_is_as_exact_as_position_zero(policy):
    ids, _ = inputs()
    model = model_of("grouped heads")
    for edges in ((0, LENGTH), CHUNKS["uneven chunks"], CHUNKS["token by token"]):
        logits = []
        with attach(model, POLICIES[policy]) as handle:
            for offset in (0, 200_000_000):
                cache = handle.new_cache(offset=offset)
                pieces = [
                    model(ids[:, a:b], **tiny.cached(cache), use_cache=True).logits
                    for a, b in zip(edges, edges[1:], strict=False)
                ]
                logits.append(torch.cat(pieces, dim=1))
        assert torch.allclose(*logits, atol=1e-5)


@pytest.mark.parametrize("policy", ["lm-infinite", "streaming-llm", "top_k", "ceiling inside the local part"])
@pytest.mark.parametrize("chunks", ["one call", "uneven chunks", "token by token"])
def test_moving_the_frame_every_few_tokens_does_not_drift(policy, chunks, monkeypatch):
    monkeypatch.setattr(layer_memory, "FRAME", W + 2)
    ids, mask = inputs()
    logits = ours(model_of("yarn"), POLICIES[policy], CHUNKS[chunks], ids, mask)
    assert largest_difference(logits, reference("yarn", policy), mask) < 1e-5
