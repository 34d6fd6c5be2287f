"""What a model multiplies and reads, counted by hand and against what caches really hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from everlong.attention import LMInfinite, attach
from everlong.evaluation.speed import fill
from everlong.evaluation.streams import StockStream, open_stream
from everlong.evaluation.work import Work, seen, twin_of, work_of
from everlong.models.packing import pack
from tests.evaluation.expected import A_KEY
from tests.tiny import LOCAL_WINDOW, VOCAB, build
from tests.tiny import random_ids as tokens

HIDDEN, INNER, HEADS, KV, SIZE = 32, 48, 4, 2, 8
A_LAYER = HIDDEN * SIZE * (2 * HEADS + 2 * KV) + 3 * HIDDEN * INNER
A_KEY_SEEN = 2 * 2 * SIZE * HEADS  # operations: a product and a sum, for the key and for the value


def by_counting(work: Work, before: int, tokens: int, window: int | None) -> int:
    """Go through the queries one by one."""
    operations = 0
    for position in range(before, before + tokens):
        operations += 2 * work.weights
        for layer in work.layers:
            limit = window if layer.window is None else layer.window
            operations += A_KEY_SEEN * min(position + 1, limit or position + 1)
    return operations


def test_weights_are_those_of_the_linear_layers_the_head_apart() -> None:
    work = work_of(build("llama"))
    assert (work.weights, work.head) == (2 * A_LAYER, HIDDEN * VOCAB)
    assert len(work.linear) == 2 * 7 and work.is_complete
    assert [(x.heads, x.kv_heads, x.key_size, x.value_size) for x in work.layers] == [(4, 2, 8, 8)] * 2


@pytest.mark.parametrize("before, count", [(0, 1), (0, 30), (15, 10), (19, 3), (20, 5), (500, 7)])
@pytest.mark.parametrize("window", [None, 20])
def test_operations_are_what_each_query_needs(before: int, count: int, window: int | None) -> None:
    for family in ("llama", "gemma3_text"):
        work = work_of(build(family))
        assert work.prefill_flops(before, count, window) == by_counting(work, before, count, window)


def test_a_token_in_a_full_window_takes_two_operations_a_weight_and_four_a_number_in_the_window() -> None:
    work = work_of(build("llama"))
    assert work.prefill_flops(10**6, 1, 2048) == 2 * 2 * A_LAYER + 2 * (2 * 2 * 2048 * SIZE * HEADS)
    assert seen(10**6, 3, None) == 3 * 10**6 + 6


def test_local_layers_see_their_own_window() -> None:
    work = work_of(build("gemma3_text"))
    assert [layer.window for layer in work.layers] == [LOCAL_WINDOW, None, LOCAL_WINDOW]
    a_token = 2 * A_KEY
    assert work.window_bytes(100) == a_token * (100 + 2 * LOCAL_WINDOW)
    assert work.window_bytes(3) == a_token * 9


def test_bytes_are_those_that_caches_hold() -> None:
    model = build("llama")
    work = work_of(model)
    stock = StockStream(model)
    fill(stock, 300)
    assert work.state_bytes(300) == sum(stock.bytes().values()) == 300 * 2 * 2 * A_KEY
    with open_stream(model, LMInfinite(window=20, sinks=0)) as ours:
        fill(ours, 300)
        assert work.window_bytes(20) == sum(ours.bytes().values())
    assert work_of(model.to(torch.bfloat16)).state_bytes(300) == 300 * 2 * A_KEY


def test_layers_that_share_keys_read_them_but_hold_none() -> None:
    work = work_of(build("gemma4_text"))
    assert [layer.has_keys for layer in work.layers] == [True, True, False, False]
    full = work.layers[1]
    assert full.key_size == 16 and work.layers[3].key_size == 16
    rows = 10_000 * work.element * full.kv_heads * 2 * full.key_size
    assert work.state_bytes(10_000) < 1.01 * rows and work.window_bytes(10_000) > 2 * rows


def test_experts_kept_as_stacks_are_said_not_to_be_counted() -> None:
    assert not work_of(build("mixtral")).is_complete


def test_a_twin_shares_the_weights_and_nothing_else() -> None:
    model: Any = build("llama")
    twin: Any = twin_of(model)
    ids = tokens(1, 12)
    with torch.no_grad():
        before = model(ids).logits
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            assert ours is theirs
        pack(twin, "int8")
        with attach(twin, LMInfinite(window=8, sinks=2)):
            assert not torch.allclose(twin(ids).logits, before, atol=1e-3)
            assert torch.equal(model(ids).logits, before)
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert twin.config is not model.config
