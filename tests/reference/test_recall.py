"""The reference of the methods that recall for groups of queries, against hand-counted cases."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny

from .attention import ReferenceSpec, Rotation, attend, places
from .model import reference_logits
from .recall import asking_groups, block_representatives, block_tokens, recallable, recalled_keys

FULL = ReferenceSpec("full")
INF_LLM = ReferenceSpec("inf-llm", sinks=2, window=16, recalled=6, block=2, representatives=1)
RE_ATTENTION = ReferenceSpec("re-attention", sinks=2, window=16, recalled=6, votes=2, radius=1)
QUEST = ReferenceSpec("quest", sinks=2, window=16, recalled=6, block=2)
STEPS = {"coarse_steps": 3, "medium_steps": 2, "block_steps": 1}
INFINITE_HIP = ReferenceSpec(
    "infinite-hip", sinks=2, window=16, recalled=6, block=2, coarse=8, medium=4, **STEPS
)
STAGES = ReferenceSpec("infinite-hip", sinks=2, window=8, recalled=1, block=1, coarse=4, medium=2, **STEPS)
EACH = pytest.mark.parametrize(
    "spec", [INF_LLM, RE_ATTENTION, QUEST, INFINITE_HIP], ids=lambda spec: spec.kind
)

# All by hand: one sink, 7 latest keys, and up to 4, 2 or 3 recalled ones.
BLOCKS = ReferenceSpec("inf-llm", sinks=1, window=12, recalled=4, block=2, representatives=1)
PAGES = ReferenceSpec("quest", sinks=1, window=10, recalled=2, block=2)
VOTES = ReferenceSpec("re-attention", sinks=1, window=11, recalled=3, votes=1, radius=1)

STILL = Rotation(torch.zeros(0, dtype=torch.float64))
"""Rotates nothing."""


def turning(angle: float) -> Rotation:
    """Rotates the first two dimensions, by this angle for each position."""
    return Rotation(torch.tensor([angle], dtype=torch.float64))


def along(sizes: dict[int, float], length: int, dimension: int = 0, otherwise: float = 0.0) -> Tensor:
    """(length, 4) float64: vectors along one dimension, of these sizes at these tokens."""
    vectors = torch.zeros(length, 4, dtype=torch.float64)
    for token in range(length):
        vectors[token, dimension] = sizes.get(token, otherwise)
    return vectors


def recalled_by(
    i: int,
    query: Tensor,
    key: Tensor,
    spec: ReferenceSpec,
    edges: list[int],
    rotation: Rotation = STILL,
) -> list[int]:
    (of_all,) = recalled_keys(query, key, rotation, spec, edges)[i]
    return of_all


# Who asks, and for what.


def test_queries_from_the_window_on_ask_in_their_groups() -> None:
    edges = [0, 10, 16, 20]
    assert asking_groups(BLOCKS, 22, edges) == [[12, 13, 14, 15], [16, 17, 18, 19], [20, 21]]
    assert asking_groups(BLOCKS, 17, edges) == [[12, 13, 14, 15], [16]]
    assert asking_groups(BLOCKS, 12, edges) == []
    assert asking_groups(BLOCKS, 15, [*range(15)]) == [[12], [13], [14]]


def test_what_the_first_asking_query_does_not_see_can_be_recalled() -> None:
    assert recallable(BLOCKS, [12, 13, 14]) == [1, 2, 3, 4, 5]
    assert recallable(BLOCKS, [14]) == [1, 2, 3, 4, 5, 6, 7]
    for first in range(12, 20):
        recalled = recallable(BLOCKS, [first])
        seen = [j for j in range(first + 1) if places(BLOCKS, first, j) is not None]
        assert sorted(recalled + seen) == list(range(first + 1))


def test_groups_are_needed_where_queries_ask_and_begin_at_the_start() -> None:
    query = torch.zeros(1, 13, 4, dtype=torch.float64)
    assert recalled_keys(query[:, :12], query[:, :12], STILL, BLOCKS, None) == {}
    with pytest.raises(ValueError, match="no edges"):
        recalled_keys(query, query, STILL, BLOCKS, None)
    for edges in ([], [1, 5], [0, 5, 5], [0, 6, 5], [-1, 0]):
        with pytest.raises(ValueError, match="begin at 0 and ascend"):
            recalled_keys(query, query, STILL, BLOCKS, edges)


def test_the_blocks_lie_behind_the_sinks() -> None:
    assert [block_tokens(BLOCKS, block) for block in range(3)] == [[1, 2], [3, 4], [5, 6]]


# InfLLM's choice. The last group begins at 14: it can recall 1 to 7, in blocks 1 2, 3 4 and 5 6, two of them.


def test_all_blocks_are_recalled_where_there_is_room() -> None:
    anything = torch.randn(1, 16, 4, dtype=torch.float64)
    assert recalled_by(13, anything, anything, BLOCKS, [0, 14]) == [1, 2, 3, 4]
    roomy = dataclasses.replace(BLOCKS, window=14, recalled=6)
    assert recalled_by(15, anything, anything, roomy, [0, 14]) == [1, 2, 3, 4, 5, 6]


def test_only_whole_blocks_are_recalled() -> None:
    spec = dataclasses.replace(BLOCKS, window=16, recalled=8, block=3)
    anything = torch.randn(1, 18, 4, dtype=torch.float64)
    assert recallable(spec, [16]) == [*range(1, 10)]
    assert recallable(spec, [17]) == [*range(1, 11)]
    later = recalled_by(17, anything, anything, spec, [0, 17])
    assert len(later) == 6 and 10 not in later
    none = dataclasses.replace(spec, block=9)
    assert recalled_by(17, anything, anything, none, [0, 17]) == []


@pytest.mark.parametrize(
    ("representatives", "recalled"), [(1, [1, 2, 5, 6]), (2, [3, 4, 5, 6]), (3, [3, 4, 5, 6])]
)
def test_a_block_is_worth_the_mean_of_its_representatives(representatives: int, recalled: list[int]) -> None:
    # Worth by one key 5, 1 and 4; by two 0, 1 and 2.
    key = along({1: 5, 2: -5, 3: 1, 4: 1, 5: 0, 6: 4}, 16)[None]
    query = along({}, 16, otherwise=1)[None]
    spec = dataclasses.replace(BLOCKS, representatives=representatives)
    assert recalled_by(15, query, key, spec, [0, 14]) == recalled


def test_of_blocks_worth_the_same_the_earlier_are_recalled() -> None:
    same = along({}, 16, otherwise=1)[None]
    assert recalled_by(15, same, same, BLOCKS, [0, 14]) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("token", "counts"), [(2, False), (3, True), (8, True), (9, False)], ids=lambda value: str(value)
)
def test_queries_in_the_blocks_that_follow_choose_the_representative(token: int, counts: bool) -> None:
    # 3 blocks follow, 3 to 8. All their queries together like key 1; the one at this token likes key 2 more.
    key = (along({1: 1}, 16) + along({2: 1}, 16, dimension=1))[None]
    query = (along({}, 16, otherwise=1) + along({token: 10}, 16, dimension=1))[None]
    chosen = block_representatives(query, key, STILL, BLOCKS, 0)
    assert chosen.tolist() == [key[0, 2 if counts else 1].tolist()]


def test_representatives_are_chosen_at_true_positions_and_kept_unrotated() -> None:
    # Alike but for a dimension that no query looks at. Turned by 0.1 the nearer key gets more; turned by 0.9
    # the farther one does, 7 positions being a whole turn.
    key = (along({}, 16, otherwise=1) + along({1: 1, 2: 2}, 16, dimension=3))[None]
    query = along({}, 16, otherwise=1)[None]
    for angle, token in ((0.1, 2), (0.9, 1)):
        for offset in (0, 5):
            chosen = block_representatives(query, key, turning(angle), BLOCKS, 0, offset)
            assert chosen.tolist() == [key[0, token].tolist()]


def test_each_key_value_head_has_representatives_of_its_own_query_heads() -> None:
    key = (along({1: 1}, 16) + along({2: 1}, 16, dimension=1)).expand(2, 16, 4)
    first, second = along({}, 16, otherwise=1), along({}, 16, dimension=1, otherwise=1)
    query = torch.stack([first, -2 * second, second, second])
    chosen = block_representatives(query, key, STILL, BLOCKS, 0)
    assert chosen.tolist() == [key[0, 1].tolist(), key[0, 2].tolist()]
    query = torch.stack([first, 2 * second, first, second])
    chosen = block_representatives(query, key, STILL, BLOCKS, 0)
    assert chosen.tolist() == [key[0, 2].tolist(), key[0, 1].tolist()]  # the second by a tie
    other = torch.stack([key[0], along({2: 1}, 16)])
    chosen = block_representatives(first.expand(4, 16, 4), other, STILL, BLOCKS, 0)
    assert chosen.tolist() == [other[0, 1].tolist(), other[1, 2].tolist()]


def test_without_following_queries_the_first_keys_represent() -> None:
    spec = ReferenceSpec("inf-llm", sinks=1, window=11, recalled=8, block=4, representatives=2)
    key = along({token: token for token in range(16)}, 16)[None]
    assert block_representatives(key, key, STILL, spec, 0).tolist() == [[1.5, 0, 0, 0]]


def test_worth_is_of_the_mean_asking_query() -> None:
    key = along({1: 1, 2: 1, 3: 2, 4: 2, 5: -3, 6: -3}, 16)[None]
    spec = dataclasses.replace(BLOCKS, representatives=2)
    for last, recalled in ((3.0, [1, 2, 3, 4]), (0.5, [1, 2, 5, 6])):
        query = along({14: -1, 15: last}, 16, otherwise=-100)[None]
        assert recalled_by(15, query, key, spec, [0, 14]) == recalled
        assert recalled_by(14, query, key, spec, [0, 14]) == recalled


def test_worth_is_at_the_distance_of_recalled_keys() -> None:
    key = along({1: 3, 2: 3, 3: 2, 4: 2, 5: 1, 6: 1}, 16)[None]
    query = along({}, 16, otherwise=1)[None]
    spec = dataclasses.replace(BLOCKS, representatives=2)
    # A quarter of a turn, where products change their sign, lies between distances 6 and 7, or 5 and 6.
    assert recalled_by(15, query, key, spec, [0, 14], turning(0.24)) == [1, 2, 3, 4]
    assert recalled_by(15, query, key, spec, [0, 14], turning(0.29)) == [3, 4, 5, 6]


def test_all_heads_choose_the_blocks_together() -> None:
    # Each query head: what the blocks are worth to it.
    spec = dataclasses.replace(BLOCKS, representatives=2)
    key = torch.stack(
        [along({1: 4, 2: 4, 3: 2, 4: 2}, 16), along({3: 3, 4: 3, 5: 6, 6: 6}, 16)]
    )  # 4 2 0 and 0 3 6
    one = along({}, 16, otherwise=1)
    assert recalled_by(15, torch.stack([one, one]), key, spec, [0, 14]) == [3, 4, 5, 6]
    assert recalled_by(15, torch.stack([one, one, 0 * one, one]), key, spec, [0, 14]) == [1, 2, 3, 4]


# Quest's choice. The last group begins at 14: it can recall 1 to 7, one of the pages 1 2, 3 4 and 5 6.


def test_a_page_is_worth_what_its_channels_could_give_together() -> None:
    # The first page has the best key. In the second no key is as good, but one has the best number of each
    # channel: 3 and 3. The third is the second with a key that costs nothing, as only the best number counts.
    query = (along({}, 16, otherwise=1) + along({}, 16, dimension=1, otherwise=-1))[None]
    key = along({1: 5, 3: 3, 5: 3, 6: -9}, 16) + along({4: -3, 6: -4}, 16, dimension=1)
    assert pages(query, key[None]) == [[5, 6]]
    key[6, 1] = -3  # of pages worth the same the earlier
    assert pages(query, key[None]) == [[3, 4]]
    key[4, 1] = -1
    key[6, 1] = -1
    assert pages(query, key[None]) == [[1, 2]]


def pages(query: Tensor, key: Tensor, rotation: Rotation = STILL, at: int = 15) -> list[list[int]]:
    return recalled_keys(query, key, rotation, PAGES, [0, 14])[at]


def test_each_key_value_head_chooses_by_the_sum_over_its_own_query_heads() -> None:
    key = (along({1: 2}, 16) + along({4: 3}, 16, dimension=1)).expand(2, 16, 4)
    first, second = along({}, 16, otherwise=1), along({}, 16, dimension=1, otherwise=1)
    assert pages(torch.stack([first, second]), key) == [[1, 2], [3, 4]]
    # Worth 2 to one head and 3 to the other; three times as much to the first as before.
    assert pages(torch.stack([first, second, 3 * first, second]), key) == [[3, 4], [1, 2]]
    # Bounds are added up, not the queries: 2 of 1 and -1, which together ask for nothing.
    key = (along({2: 1}, 16) + along({5: 2, 6: -2}, 16)).expand(1, 16, 4)
    assert pages(torch.stack([first, -first]), key) == [[5, 6]]


def test_a_page_is_judged_by_the_mean_query_at_the_distance_of_recalled_keys() -> None:
    key = along({1: 1, 2: 1, 3: -2, 4: -2}, 16)[None]
    for last, recalled in ((3.0, [1, 2]), (0.5, [3, 4])):
        query = along({14: -1, 15: last}, 16, otherwise=-100)[None]
        assert pages(query, key, at=14) == pages(query, key) == [recalled]
    query = along({}, 16, otherwise=1)[None]
    # A quarter of a turn, where products change their sign, lies between distances 6 and 7, or 5 and 6.
    assert pages(query, key, turning(0.24)) == [[1, 2]]
    assert pages(query, key, turning(0.29)) == [[3, 4]]


def test_a_head_sees_the_pages_that_it_recalls_and_no_others() -> None:
    key = torch.stack([along({4: 1}, 16), along({5: 1}, 16)])
    query = along({}, 16, otherwise=1).expand(4, 16, 4)
    seen = attend(query, key, torch.eye(16).expand(2, 16, 16), STILL, 1.0, PAGES, edges=[0, 14])[:, 15] > 0
    for head, recalled in enumerate(([3, 4], [3, 4], [5, 6], [5, 6])):
        assert seen[head].nonzero().flatten().tolist() == [0, *recalled, *range(9, 16)]


# ReAttention's choice. The last group begins at 12: it can recall 1 to 5, one chosen key and its neighbours.


@pytest.mark.parametrize(
    ("liked", "recalled"), [(3, [2, 3, 4]), (1, [1, 2]), (5, [4, 5]), (0, [1, 2]), (6, [1, 2])]
)
def test_the_key_with_most_votes_is_recalled_with_its_neighbours(liked: int, recalled: list[int]) -> None:
    key, query = along({liked: 1}, 14)[None], along({}, 14, otherwise=1)[None]
    assert recalled_by(13, query, key, VOTES, [0, 12]) == recalled
    assert recalled_by(13, query, key, VOTES, [0, 12], turning(2.0)) == recalled


def test_votes_are_counted_and_not_weighed() -> None:
    # Query 12 likes key 5, and much; 13 and 14 like key 2.
    key = (along({5: 9}, 15) + along({2: 1}, 15, dimension=1))[None]
    query = (along({12: 1}, 15) + along({13: 1, 14: 1}, 15, dimension=1))[None]
    assert recalled_by(13, query, key, VOTES, [0, 12]) == [1, 2, 3]
    assert recalled_by(13, query, key, VOTES, [0, 12, 14]) == [1, 2, 3]  # one vote each: the earlier
    assert recalled_by(12, query, key, VOTES, [0, 12, 13]) == [4, 5]
    more = torch.cat((query, along({}, 15, otherwise=1)[None]))
    assert recalled_by(13, more, key, VOTES, [0, 12]) == [4, 5]


def test_each_query_head_votes_by_its_key_value_head() -> None:
    # By the first key-value head 2 is liked and 5 disliked, by the second 4 and 3.
    key = torch.stack([along({2: 1, 5: -1}, 13), along({4: 1, 3: -1}, 13)])
    one = along({}, 13, otherwise=1)
    spec = dataclasses.replace(VOTES, radius=0, recalled=1, window=9)
    assert recalled_by(12, torch.stack([one, one, -one, one]), key, spec, [0, 12]) == [2]
    assert recalled_by(12, torch.stack([one, -one, one, one]), key, spec, [0, 12]) == [4]


def test_queries_before_the_window_have_no_vote() -> None:
    key = (along({3: 1}, 12) + along({1: 1}, 12, dimension=1))[None]
    query = (along({11: 1}, 12) + along({11: 0}, 12, dimension=1, otherwise=1))[None]
    assert recalled_by(11, query, key, VOTES, [0]) == [2, 3, 4]


def test_only_keys_with_a_vote_are_chosen() -> None:
    key, query = along({2: 2, 4: 3, 5: 1}, 14)[None], along({}, 14, otherwise=1)[None]
    for votes, recalled in ((1, [4]), (2, [2, 4]), (3, [2, 4, 5]), (9, [1, 2, 3])):
        spec = dataclasses.replace(VOTES, votes=votes, radius=0)
        assert recalled_by(13, query, key, spec, [0, 12]) == recalled


def test_neighbours_are_recalled_once() -> None:
    spec = ReferenceSpec("re-attention", sinks=1, window=14, recalled=6, votes=2, radius=1)
    key, query = along({2: 1, 3: 1}, 15)[None], along({}, 15, otherwise=1)[None]
    assert recalled_by(14, query, key, spec, [0]) == [1, 2, 3, 4]


def test_as_many_keys_are_chosen_as_have_room_with_all_their_neighbours() -> None:
    key, query = along({1: 3, 4: 1, 7: 2}, 15)[None], along({}, 15, otherwise=1)[None]
    for recalled, window, seen in ((6, 14, [1, 2, 3, 4, 5]), (5, 13, [1, 2]), (2, 10, [])):
        spec = dataclasses.replace(VOTES, recalled=recalled, window=window, votes=3)
        assert recalled_by(14, query, key, spec, [0, 14]) == seen


# What a query sees, and where.


def test_inf_llm_places_sinks_and_recalled_keys_at_one_distance() -> None:
    seen = {j: places(BLOCKS, 14, j, offset=100, recalled=[3, 4]) for j in range(17)}
    latest = {j: (114, 100 + j) for j in range(8, 15)}
    assert {j: at for j, at in seen.items() if at} == {0: (6, 0), 3: (6, 0), 4: (6, 0)} | latest


def test_re_attention_places_by_the_cache() -> None:
    seen = {j: places(VOTES, 14, j, offset=100, recalled=[3, 4]) for j in range(17)}
    latest = {j: (9, j - 5) for j in range(8, 15)}
    assert {j: at for j, at in seen.items() if at} == {0: (9, 0), 3: (9, 1), 4: (9, 2)} | latest


@EACH
def test_before_the_window_and_in_local_layers_nothing_is_recalled(spec: ReferenceSpec) -> None:
    assert [places(spec, 15, j, offset=7) for j in range(16)] == [(22, 7 + j) for j in range(16)]
    for j in range(20):
        assert places(spec, 18, j, 5, 7, [3, 4]) == places(FULL, 18, j, 5, 7)
    x = torch.randn(1, 20, 4)
    local = attend(x, x, x, turning(0.1), 1.0, spec, sliding=5)
    torch.testing.assert_close(local, attend(x, x, x, turning(0.1), 1.0, FULL, sliding=5))


# Weights worked out by hand: every query and key equal to (1, 0), so that a logit is twice the cosine of the
# distance's angle; the values are the identity, so that the output is the weights.


def weights(spec: ReferenceSpec, length: int, edges: list[int]) -> Tensor:
    ones = torch.tensor([1.0, 0.0]).expand(1, length, 2)
    return attend(ones, ones, torch.eye(length)[None], turning(0.1), 2.0, spec, edges=edges)[0]


@pytest.mark.parametrize(
    ("spec", "i", "distances"),
    [
        # Alike keys are all worth the same, and the earliest are recalled: 1 to 4.
        (BLOCKS, 14, {0: 6, 1: 6, 2: 6, 3: 6, 4: 6} | {j: 14 - j for j in range(8, 15)}),
        (BLOCKS, 15, {0: 6, 1: 6, 2: 6, 3: 6, 4: 6} | {j: 15 - j for j in range(9, 16)}),
        (PAGES, 15, {0: 6, 1: 6, 2: 6} | {j: 15 - j for j in range(9, 16)}),
        # All vote for key 1; 2 is its only neighbour.
        (VOTES, 14, {0: 9, 1: 8, 2: 7} | {j: 14 - j for j in range(8, 15)}),
        (VOTES, 15, {0: 9, 1: 8, 2: 7} | {j: 15 - j for j in range(9, 16)}),
    ],
)
def test_weights_are_one_softmax_over_what_is_seen(
    spec: ReferenceSpec, i: int, distances: dict[int, int]
) -> None:
    expected = torch.zeros(16, dtype=torch.float64)
    for j, distance in distances.items():
        expected[j] = math.exp(2 * math.cos(0.1 * distance))
    torch.testing.assert_close(weights(spec, 16, [0, 14])[i], expected / expected.sum())


def test_with_nothing_recalled_the_latest_keys_remain_as_other_methods_see_them() -> None:
    inf_llm = ReferenceSpec("inf-llm", sinks=2, window=9, block=1, representatives=1)
    lm_infinite = ReferenceSpec("lm-infinite", sinks=2, window=9, ceiling=6)
    torch.testing.assert_close(weights(inf_llm, 14, [0, 11])[9:], weights(lm_infinite, 14, [])[9:])
    re_attention = ReferenceSpec("re-attention", sinks=2, window=9, votes=1)
    streaming_llm = ReferenceSpec("streaming-llm", sinks=2, window=9)
    torch.testing.assert_close(weights(re_attention, 14, [0, 11]), weights(streaming_llm, 14, []))


# Whole models.


@EACH
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_window_as_long_as_the_input_is_full_and_a_shorter_one_is_not(
    spec: ReferenceSpec, family: str
) -> None:
    model, ids = tiny.build(family), tiny.random_ids(1, 24)
    full = reference_logits(model, ids[:, :16], FULL)
    assert torch.equal(reference_logits(model, ids[:, :16], spec), full)
    longer = reference_logits(model, ids, spec, edges=[0, 20])
    torch.testing.assert_close(longer[:, :16], full, atol=1e-5, rtol=0)
    assert (longer - reference_logits(model, ids, FULL)).abs().amax(dim=-1)[0, 16:].max() > 1e-2


@EACH
def test_a_group_knows_nothing_of_later_ones(spec: ReferenceSpec) -> None:
    model, ids = tiny.build("llama"), tiny.random_ids(1, 28)
    for edges in ([0, 5, 18, 22], [*range(28)]):
        whole = reference_logits(model, ids, spec, edges=edges)
        for end in (18, 22):
            part = reference_logits(model, ids[:, :end], spec, edges=edges)
            torch.testing.assert_close(part, whole[:, :end], atol=1e-5, rtol=0)


@EACH
def test_a_padded_row_is_the_row_alone_and_its_groups_are_counted_without_padding(
    spec: ReferenceSpec,
) -> None:
    model = tiny.build("llama")
    ids, mask = tiny.left_padded([28, 22])
    together = reference_logits(model, ids, spec, mask, edges=[0, 19, 25])[1, 6:]
    alone = reference_logits(model, ids[1:, 6:], spec, edges=[0, 19])[0]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@EACH
def test_a_far_away_start_of_the_row_changes_nothing(spec: ReferenceSpec) -> None:
    model, ids = tiny.build("llama"), tiny.random_ids(1, 26)
    near = reference_logits(model, ids, spec, edges=[0, 20])
    far = reference_logits(model, ids, spec, offset=1_000_000, edges=[0, 20])
    torch.testing.assert_close(near, far, atol=1e-4, rtol=0)


SPECS = INF_LLM, RE_ATTENTION, QUEST
STEPPED = {
    **{"sinks": (1, 3), "window": (7, 9), "recalled": (2,), "coarse": (2, 8), "medium": (1, 4)},
    **{"coarse_steps": (1, 4), "medium_steps": (1,), "block_steps": (2,)},
}
NEIGHBOURS: list[tuple[ReferenceSpec, dict[str, Any]]] = [
    *((spec, {"sinks": sinks}) for spec in SPECS for sinks in (1, 3)),
    *((spec, {"window": window}) for spec in SPECS for window in (15, 17)),
    *((spec, {"recalled": recalled}) for spec in SPECS for recalled in (5, 7)),
    *((QUEST, {"block": block}) for block in (1, 3)),
    (INF_LLM, {"block": 1}),
    (INF_LLM, {"block": 3}),
    (INF_LLM, {"representatives": 2}),
    (RE_ATTENTION, {"votes": 1}),
    (RE_ATTENTION, {"votes": 3}),
    (RE_ATTENTION, {"radius": 0}),
    (RE_ATTENTION, {"radius": 2}),
]


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_constant_or_an_edge_off_by_one_shows_in_the_logits(family: str) -> None:
    model, ids = tiny.build(family), tiny.random_ids(1, 32)
    edges = [0, 18, 23, 28]
    known = {spec: reference_logits(model, ids, spec, edges=edges) for spec in SPECS}
    for spec, change in NEIGHBOURS:
        other = reference_logits(model, ids, dataclasses.replace(spec, **change), edges=edges)
        assert (known[spec] - other).abs().max() > 1e-3, (spec, change)
    for spec in known:
        for moved in ([0, 18, 22, 28], [0, 18, 24, 28], [0, 18, 28]):
            other = reference_logits(model, ids, spec, edges=moved)
            assert (known[spec] - other).abs().max() > 1e-3, (spec, moved)


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_constant_of_a_stage_shows_in_the_logits(family: str) -> None:
    model, ids = tiny.build(family), tiny.random_ids(1, 34)
    edges = [0, *range(20, 34)]
    known = reference_logits(model, ids, STAGES, edges=edges)
    for name, others in STEPPED.items():
        for number in others:
            changed = dataclasses.replace(STAGES, **{name: number})
            other = reference_logits(model, ids, changed, edges=edges)
            assert (known - other).abs().max() > 1e-3, (name, number)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "infinite-hip", "window": 8, "recalled": 4, "block": 2},
        {"kind": "infinite-hip", "window": 8, "block": 4, "coarse": 8, "medium": 2, **STEPS},
        {"kind": "quest", "window": 8, "recalled": 4, "block": 2, "coarse_steps": 3},
        {"kind": "inf-llm", "window": 8, "recalled": 4},
        {"kind": "inf-llm", "window": 8, "recalled": 4, "block": 2},
        {"kind": "inf-llm", "block": 2, "representatives": 1},
        {"kind": "inf-llm", "window": 8, "recalled": 8, "block": 2, "representatives": 1},
        {"kind": "inf-llm", "window": 8, "sinks": 4, "recalled": 4, "block": 2, "representatives": 1},
        {"kind": "inf-llm", "window": 8, "recalled": -1, "block": 2, "representatives": 1},
        {"kind": "inf-llm", "window": 8, "block": 2, "representatives": 1, "votes": 1},
        {"kind": "inf-llm", "window": 8, "block": 2, "representatives": 1, "radius": 1},
        {"kind": "inf-llm", "window": 8, "block": 2, "representatives": 1, "ceiling": 7},
        {"kind": "quest", "window": 8, "recalled": 4},
        {"kind": "quest", "window": 8, "recalled": 4, "block": 2, "representatives": 1},
        {"kind": "quest", "window": 8, "recalled": 4, "block": 2, "layers": 2},
        {"kind": "re-attention", "window": 8, "recalled": 4},
        {"kind": "re-attention", "window": 8, "recalled": 4, "votes": 1, "radius": -1},
        {"kind": "re-attention", "window": 8, "recalled": 4, "votes": 1, "block": 1},
        {"kind": "re-attention", "window": 8, "recalled": 4, "votes": 1, "top_k": 1},
        {"kind": "lm-infinite", "window": 8, "recalled": 4},
        {"kind": "full", "radius": 1},
    ],
)
def test_constants_without_a_meaning_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no such method"):
        ReferenceSpec(**change)
