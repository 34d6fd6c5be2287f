"""The reference against hand-counted cases, and against stock transformers where both must agree."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests import tiny

from .attention import ReferenceSpec, Rotation, attend, middle_keys, places
from .generate import reference_generate
from .model import reference_logits

FULL = ReferenceSpec("full")
LM_INFINITE = ReferenceSpec("lm-infinite", sinks=3, window=16, ceiling=15)
STREAMING_LLM = ReferenceSpec("streaming-llm", sinks=3, window=16)
RECALL = dataclasses.replace(LM_INFINITE, top_k=2, top_k_layers=1)

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, one key-value head": ("llama", {"num_key_value_heads": 1}),
    "llama, no grouping": ("llama", {"num_key_value_heads": 4}),
    "llama, YaRN": ("llama", tiny.YARN),
    "mistral": ("mistral", {}),
    "mistral, local": ("mistral", {"sliding_window": tiny.LOCAL_WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "phi": ("phi", {}),
    "phi, normed queries": ("phi", {"qk_layernorm": True}),
    "stablelm": ("stablelm", {}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "gemma3": ("gemma3_text", {}),
    "gemma3, capped": ("gemma3_text", {"final_logit_softcapping": 2.0}),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    family, overrides = MODELS[request.param]
    return tiny.build(family, **overrides)


@torch.no_grad()
def stock_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    logits: Tensor = model(ids, attention_mask=mask).logits
    return logits


def seen(spec: ReferenceSpec, i: int, sliding: int | None = None) -> dict[int, tuple[int, int]]:
    """Every key that query i sees, with the two places."""
    found = {j: places(spec, i, j, sliding) for j in range(20)}
    return {j: at for j, at in found.items() if at is not None}


# Counted by hand: window 5, 2 sinks, so 3 recent keys.


def test_lm_infinite_sees_sinks_and_recent_keys_with_distances_up_to_the_ceiling() -> None:
    spec = ReferenceSpec("lm-infinite", sinks=2, window=5, ceiling=4)
    assert seen(spec, 0) == {0: (0, 0)}
    assert seen(spec, 4) == {0: (4, 0), 1: (4, 1), 2: (4, 2), 3: (4, 3), 4: (4, 4)}
    assert seen(spec, 5) == {0: (4, 0), 1: (5, 1), 3: (5, 3), 4: (5, 4), 5: (5, 5)}
    assert seen(spec, 6) == {0: (4, 0), 1: (4, 0), 4: (6, 4), 5: (6, 5), 6: (6, 6)}


def test_lm_infinite_without_a_ceiling_keeps_true_distances() -> None:
    spec = ReferenceSpec("lm-infinite", sinks=2, window=5)
    assert seen(spec, 9) == {0: (9, 0), 1: (9, 1), 7: (9, 7), 8: (9, 8), 9: (9, 9)}


def test_streaming_llm_places_keys_by_their_index_in_the_cache() -> None:
    spec = ReferenceSpec("streaming-llm", sinks=2, window=5)
    assert seen(spec, 3) == {0: (3, 0), 1: (3, 1), 2: (3, 2), 3: (3, 3)}
    assert seen(spec, 4) == {0: (4, 0), 1: (4, 1), 2: (4, 2), 3: (4, 3), 4: (4, 4)}
    assert seen(spec, 5) == {0: (4, 0), 1: (4, 1), 3: (4, 2), 4: (4, 3), 5: (4, 4)}
    assert seen(spec, 12) == {0: (4, 0), 1: (4, 1), 10: (4, 2), 11: (4, 3), 12: (4, 4)}


def test_full_attention_sees_everything_before_it() -> None:
    assert seen(FULL, 3) == {0: (3, 0), 1: (3, 1), 2: (3, 2), 3: (3, 3)}
    assert seen(ReferenceSpec("full", ceiling=2), 3) == {0: (2, 0), 1: (3, 1), 2: (3, 2), 3: (3, 3)}


def test_self_extend_groups_what_is_no_neighbour() -> None:
    spec = ReferenceSpec("self-extend", neighbours=4, group_size=2)
    assert seen(spec, 3) == {0: (3, 0), 1: (3, 1), 2: (3, 2), 3: (3, 3)}
    # From 7 // 2 + 4 - 4 // 2 = 5.
    assert seen(spec, 7) == {
        **{0: (5, 0), 1: (5, 0), 2: (5, 1), 3: (5, 1)},
        **{4: (7, 4), 5: (7, 5), 6: (7, 6), 7: (7, 7)},
    }


def test_dual_chunk_places_queries_in_three_ways() -> None:
    spec = ReferenceSpec("dual-chunk", chunk=3, positions=5)
    assert seen(spec, 2) == {0: (2, 0), 1: (2, 1), 2: (2, 2)}
    assert seen(spec, 3) == {0: (3, 0), 1: (3, 1), 2: (3, 2), 3: (0, 0)}
    assert seen(spec, 5) == {0: (4, 0), 1: (4, 1), 2: (4, 2), 3: (2, 0), 4: (2, 1), 5: (2, 2)}
    assert seen(spec, 6) == {
        **{0: (4, 0), 1: (4, 1), 2: (4, 2)},
        **{3: (3, 0), 4: (3, 1), 5: (3, 2), 6: (0, 0)},
    }


@pytest.mark.parametrize("spec", [FULL, LM_INFINITE, STREAMING_LLM])
def test_local_layers_keep_true_distances_whatever_the_method(spec: ReferenceSpec) -> None:
    assert seen(spec, 18, sliding=2) == {17: (18, 17), 18: (18, 18)}


def test_middle_keys_lie_between_the_sinks_and_the_window() -> None:
    spec = ReferenceSpec("lm-infinite", sinks=2, window=5, ceiling=4, top_k=1)
    assert middle_keys(spec, layer=4, i=4) == []
    assert middle_keys(spec, layer=4, i=5) == [2]
    assert middle_keys(spec, layer=4, i=8) == [2, 3, 4, 5]
    assert middle_keys(spec, layer=3, i=8) == []


@pytest.mark.parametrize("spec", [LM_INFINITE, STREAMING_LLM])
def test_no_query_sees_more_keys_or_distances_than_the_window(spec: ReferenceSpec) -> None:
    for i in range(20):
        assert len(seen(spec, i)) == min(i + 1, 16)
        assert all(0 <= query - key <= 15 for query, key in seen(spec, i).values())


# Weights worked out by hand: one frequency, every query and key equal to (1, 0), so that a logit is twice the
# cosine of the distance's angle; the values are the identity, so that the output is the weights.


def weights(
    spec: ReferenceSpec, length: int, layer: int = 0, scaling: float = 1.0, offset: int = 0
) -> Tensor:
    ones = torch.tensor([1.0, 0.0]).expand(1, length, 2)
    rotation = Rotation(torch.tensor([0.1], dtype=torch.float64), scaling)
    return attend(ones, ones, torch.eye(length)[None], rotation, 2.0, spec, layer, offset=offset)[0]


def softmax_of_distances(distances: list[int], factor: float = 2.0) -> list[float]:
    powers = [math.exp(factor * math.cos(0.1 * distance)) for distance in distances]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize(
    ("spec", "keys", "distances"),
    [
        (FULL, [0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0]),
        (ReferenceSpec("lm-infinite", 2, 5, ceiling=4), [0, 1, 5, 6, 7], [4, 4, 2, 1, 0]),
        (ReferenceSpec("lm-infinite", 2, 5), [0, 1, 5, 6, 7], [7, 6, 2, 1, 0]),
        (ReferenceSpec("streaming-llm", 2, 5), [0, 1, 5, 6, 7], [4, 3, 2, 1, 0]),
    ],
)
def test_weights_are_one_softmax_over_what_is_seen(
    spec: ReferenceSpec, keys: list[int], distances: list[int]
) -> None:
    expected = torch.zeros(8, dtype=torch.float64)
    expected[keys] = torch.tensor(softmax_of_distances(distances), dtype=torch.float64)
    torch.testing.assert_close(weights(spec, 8)[7], expected)


def test_attention_scaling_multiplies_queries_and_keys() -> None:
    expected = torch.tensor(softmax_of_distances([2, 1, 0], factor=2.0 * 1.5**2), dtype=torch.float64)
    torch.testing.assert_close(weights(FULL, 3, scaling=1.5)[2], expected)


def test_dimensions_beyond_the_rotated_ones_stay() -> None:
    rotation = Rotation(torch.tensor([math.pi / 2], dtype=torch.float64))
    rotated = rotation(torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64), 1)
    torch.testing.assert_close(rotated, torch.tensor([[-2.0, 1.0, 3.0, 4.0]], dtype=torch.float64))


def test_each_query_head_recalls_its_own_best_middle_keys_at_the_given_distance() -> None:
    length = 8
    spec = ReferenceSpec("lm-infinite", 1, 4, ceiling=3, top_k=2, top_k_layers=0, top_k_distance=6)
    # The last query has middle keys 1 to 4; only there do the keys differ, and by less with the second head.
    key = torch.tensor([[1.0, 0.0]]).repeat(length, 1)
    key[1:5, 0] = torch.tensor([5.0, 7.0, 6.0, 8.0])
    query = torch.tensor([1.0, -0.5])[:, None, None] * torch.tensor([[1.0, 0.0]]).expand(length, 2)
    rotation = Rotation(torch.tensor([0.1], dtype=torch.float64))
    identity = torch.eye(length)[None]
    last = attend(query, key[None], identity, rotation, 1.0, spec, layer=0)[:, -1]

    for head, factor, best in ((0, 1.0, {2: 7.0, 4: 8.0}), (1, -0.5, {1: 5.0, 3: 6.0})):
        distances = {0: 3, 5: 2, 6: 1, 7: 0}
        logits = {j: factor * math.cos(0.1 * distance) for j, distance in distances.items()}
        logits |= {j: factor * size * math.cos(0.6) for j, size in best.items()}
        total = sum(math.exp(logit) for logit in logits.values())
        expected = [math.exp(logits[j]) / total if j in logits else 0.0 for j in range(length)]
        torch.testing.assert_close(last[head], torch.tensor(expected, dtype=torch.float64))


def test_recall_takes_every_middle_key_where_there_are_fewer_than_k() -> None:
    spec = ReferenceSpec("lm-infinite", 1, 4, ceiling=3, top_k=9, top_k_layers=0)
    expected = torch.tensor(softmax_of_distances([3, 2, 2, 2, 1, 0]), dtype=torch.float64)
    torch.testing.assert_close(weights(spec, 6)[5], expected)
    untouched = dataclasses.replace(spec, top_k=0)
    torch.testing.assert_close(weights(spec, 6)[:4], weights(untouched, 6)[:4])


def test_recall_begins_at_its_layer() -> None:
    spec = ReferenceSpec("lm-infinite", 1, 4, ceiling=3, top_k=1, top_k_layers=2)
    without = dataclasses.replace(spec, top_k=0)
    torch.testing.assert_close(weights(spec, 8, layer=1), weights(without, 8))
    assert (weights(spec, 8, layer=2) - weights(without, 8)).abs().max() > 0.01


@pytest.mark.parametrize("spec", [FULL, LM_INFINITE, STREAMING_LLM, RECALL])
def test_a_far_away_start_of_the_row_changes_nothing(spec: ReferenceSpec) -> None:
    near, far = weights(spec, 24, layer=1), weights(spec, 24, layer=1, offset=200_000_000)
    torch.testing.assert_close(near, far, atol=1e-7, rtol=0)


# Whole models.


@pytest.mark.parametrize(
    "spec",
    [
        FULL,
        ReferenceSpec("lm-infinite", sinks=3, window=24, ceiling=23, top_k=2, top_k_layers=0),
        ReferenceSpec("streaming-llm", sinks=3, window=24),
    ],
    ids=lambda spec: spec.kind,
)
def test_a_window_as_long_as_the_input_gives_the_stock_logits(
    model: PreTrainedModel, spec: ReferenceSpec
) -> None:
    ids = tiny.random_ids(1, 24)
    reference, stock = reference_logits(model, ids, spec), stock_logits(model, ids)
    torch.testing.assert_close(reference, stock, atol=1e-4, rtol=0)


def test_left_padded_rows_give_the_stock_logits(model: PreTrainedModel) -> None:
    ids, mask = tiny.left_padded([24, 17, 5])
    reference, stock = reference_logits(model, ids, FULL, mask), stock_logits(model, ids, mask)
    torch.testing.assert_close(reference[mask.bool()], stock[mask.bool()], atol=1e-4, rtol=0)
    assert reference[~mask.bool()].isnan().all()


@pytest.mark.parametrize("spec", [LM_INFINITE, STREAMING_LLM, RECALL])
def test_a_padded_row_is_the_row_alone(spec: ReferenceSpec) -> None:
    model = tiny.build("llama")
    ids, mask = tiny.left_padded([30, 21])
    together = reference_logits(model, ids, spec, mask)[1, 9:]
    alone = reference_logits(model, ids[1:, 9:], spec)[0]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("spec", [LM_INFINITE, STREAMING_LLM, RECALL])
def test_the_first_window_of_a_longer_input_is_stock_and_the_rest_is_not(spec: ReferenceSpec) -> None:
    model = tiny.build("llama")
    ids = tiny.random_ids(1, 30)
    difference = (reference_logits(model, ids, spec) - stock_logits(model, ids)).abs().amax(dim=-1)[0]
    assert difference[:16].max() < 1e-4
    assert difference[16:].max() > 1e-2


NEIGHBOURS: list[tuple[ReferenceSpec, dict[str, Any]]] = [
    (LM_INFINITE, {"sinks": 2}),
    (LM_INFINITE, {"sinks": 4}),
    (LM_INFINITE, {"window": 15}),
    (LM_INFINITE, {"window": 17}),
    (LM_INFINITE, {"ceiling": 14}),
    (LM_INFINITE, {"ceiling": 16}),
    (LM_INFINITE, {"ceiling": None}),
    (STREAMING_LLM, {"sinks": 2}),
    (STREAMING_LLM, {"sinks": 4}),
    (STREAMING_LLM, {"window": 15}),
    (STREAMING_LLM, {"window": 17}),
    (RECALL, {"top_k": 1}),
    (RECALL, {"top_k": 3}),
    (RECALL, {"top_k_layers": 2}),
    (RECALL, {"top_k_distance": 7}),
    (RECALL, {"top_k_distance": 9}),
]


@pytest.mark.parametrize("family", ["llama", "phi", "qwen3", "gemma3_text"])
def test_a_constant_off_by_one_shows_in_the_logits(family: str) -> None:
    model = tiny.build(family)
    ids = tiny.random_ids(1, 28)
    known = {spec: reference_logits(model, ids, spec) for spec in (LM_INFINITE, STREAMING_LLM, RECALL)}
    for spec, change in NEIGHBOURS:
        other = reference_logits(model, ids, dataclasses.replace(spec, **change))
        assert (known[spec] - other).abs().max() > 1e-3, (spec, change)


def test_recall_in_the_first_layer_shows_only_where_that_layer_sees_far() -> None:
    ids = tiny.random_ids(1, 28)
    earlier = dataclasses.replace(RECALL, top_k_layers=0)
    for family, shows in (("llama", True), ("gemma3_text", False)):  # gemma's first layer is local
        model = tiny.build(family)
        difference = reference_logits(model, ids, RECALL) - reference_logits(model, ids, earlier)
        assert bool(difference.abs().max() > 1e-3) == shows, family


def test_greedy_generation_inside_the_window_is_stock() -> None:
    model: Any = tiny.build("qwen2")
    ids, mask = tiny.left_padded([10, 6])
    stock = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    ours = reference_generate(model, ids, LM_INFINITE, max_new_tokens=6, attention_mask=mask)
    assert ours.tolist() == stock.tolist()


def test_greedy_generation_takes_the_most_likely_token_of_the_method() -> None:
    model = tiny.build("llama")
    written = reference_generate(model, tiny.random_ids(1, 20), LM_INFINITE, max_new_tokens=5)
    likeliest = reference_logits(model, written, LM_INFINITE).argmax(dim=-1)
    assert written[0, 20:].tolist() == likeliest[0, 19:-1].tolist()


@pytest.mark.parametrize(
    "constants",
    [
        {"kind": "lm-infinite"},
        {"kind": "lm-infinite", "sinks": 4, "window": 4},
        {"kind": "streaming-llm", "window": 8, "ceiling": 7},
        {"kind": "streaming-llm", "window": 8, "top_k": 1},
        {"kind": "full", "window": 8},
        {"kind": "self-extend", "neighbours": 8},
        {"kind": "self-extend", "neighbours": 8, "group_size": 2, "window": 9},
        {"kind": "dual-chunk", "chunk": 8, "positions": 8},
        {"kind": "full", "chunk": 8, "positions": 9},
    ],
)
def test_constants_without_a_meaning_are_refused(constants: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no such method"):
        ReferenceSpec(**constants)


def test_right_padding_and_unknown_models_are_refused() -> None:
    ids = tiny.random_ids(1, 4)
    with pytest.raises(ValueError, match="not on the left"):
        reference_logits(tiny.build("llama"), ids, FULL, torch.tensor([[1, 1, 1, 0]]))
    with pytest.raises(ValueError, match="not gpt_neox"):
        reference_logits(tiny.build("gpt_neox"), ids, FULL)
