"""The reference of InfiniteHiP's three stages, against hand-counted cases."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import ReferenceSpec
from .infinite_hip import Stages, best_chunks, descend, in_stages, token_worth, whole_blocks

# One sink, 3 latest keys, one recalled block of 2: chunks of 8 and of 4, numbered from token 1 on.
SPEC = ReferenceSpec(
    "infinite-hip",
    sinks=1,
    window=6,
    recalled=2,
    block=2,
    coarse=8,
    medium=4,
    coarse_steps=4,
    medium_steps=3,
    block_steps=2,
)
ONE = torch.ones(1, 100, 1, dtype=torch.float64)
"""A head whose queries are all 1: a token is worth its key."""


def keys(sizes: dict[int, float]) -> Tensor:
    """(100, 1) float64: keys of these sizes at these tokens, and 0 elsewhere."""
    made = torch.zeros(100, 1, dtype=torch.float64)
    for token, size in sizes.items():
        made[token] = size
    return made


def test_only_whole_blocks_before_the_latest_keys_can_be_recalled() -> None:
    assert whole_blocks(SPEC, 7) == [1, 2, 3, 4]
    assert whole_blocks(SPEC, 8) == whole_blocks(SPEC, 7)  # 5 could be, but not 6
    assert whole_blocks(SPEC, 9) == [*range(1, 7)]


def test_a_descent_keeps_the_half_whose_first_token_is_worth_more() -> None:
    tokens = [*range(1, 9)]
    assert descend(ONE, keys({5: 1}), [50], tokens) == 5
    assert descend(ONE, keys({5: 1, 7: 2, 8: 3}), [50], tokens) == 8
    assert descend(ONE, keys({3: 9, 5: 1}), [50], tokens) == 5  # nobody looks at 3
    assert descend(ONE, keys({1: 2, 5: 1, 2: 5}), [50], tokens) == 2
    assert descend(ONE, keys({}), [50], tokens) == 1  # of halves worth the same the earlier


def test_a_token_is_worth_its_product_with_the_mean_query_of_all_its_heads() -> None:
    query = torch.zeros(2, 100, 1, dtype=torch.float64)
    query[0, 50], query[0, 51], query[1, 50], query[1, 60] = 4, -2, 3, 100
    assert token_worth(query, keys({7: 2}), [50, 51], 7) == 2 * (4 - 2) / 2 + 2 * 3 / 2
    assert token_worth(query, keys({7: 2}), [51], 7) == -4


def test_a_stage_leaves_the_best_whole_chunks_and_those_that_are_not_whole() -> None:
    few = ReferenceSpec(**{**SPEC.__dict__, "recalled": 1, "block": 1, "window": 5})
    within = [*range(1, 36)]  # four whole chunks of 8, and three tokens of another
    assert best_chunks(ONE, keys({9: 2, 25: 3, 1: 1}), few, [50], within, 0) == [1, 3, 4]
    assert best_chunks(ONE, keys({9: 2, 25: 2, 1: 2}), few, [50], within, 0) == [0, 1, 4]
    assert best_chunks(ONE, keys({10: 2, 25: 3, 1: 1}), few, [50], within, 1) == [6, 8]  # 10 is not looked at
    assert best_chunks(ONE, keys({7: 9, 20: 3}), few, [50], [6, 7, 19, 20], 2) == [6]


def test_what_a_stage_chose_is_used_for_so_many_single_queries() -> None:
    few = ReferenceSpec(**{**SPEC.__dict__, "recalled": 1, "block": 1, "window": 5})
    key, stages = keys({1: 1, 9: 1, 17: 5, 25: 9}), Stages()
    # Each of the queries 40 to 48 likes other keys: at first 25 most.
    assert in_stages(ONE, key, few, [40], stages) == [25]
    key[29, 0] = 20  # in the third stage's chunk no more than in the second's
    key[26, 0] = 10
    recalled = []
    for i in range(41, 49):
        recalled += in_stages(ONE, key, few, [i], stages)
    # The third stage asks again with the third query, and finds 26; the second with the fourth, and finds 29.
    assert recalled == [25, 26, 29, 29, 29, 29, 29, 29]
    key[33, 0] = 99  # in a chunk that the first stage has not left
    recalled = []
    for i in range(49, 54):
        recalled += in_stages(ONE, key, few, [i], stages)
    assert recalled == [29, 29, 29, 33, 33]


def test_a_group_of_several_asks_anew_and_leaves_nothing() -> None:
    few = ReferenceSpec(**{**SPEC.__dict__, "recalled": 1, "block": 1, "window": 5})
    key, stages = keys({9: 1}), Stages()
    assert in_stages(ONE, key, few, [40], stages) == [9]
    key[17, 0] = 2
    assert in_stages(ONE, key, few, [41], stages) == [9]
    assert in_stages(ONE, key, few, [41, 42], stages) == [17]
    key[25, 0] = 3
    assert in_stages(ONE, key, few, [43], stages) == [25]
