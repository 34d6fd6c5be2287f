"""Recalled blocks in a pool: what is placed is what the base places, bit by bit, and few are read again."""

import copy
import random

import pytest
import torch

import tests.tiny as tiny
from everlong.attention import InfLLM, Quest, Recall, Tier, attach, tiers
from everlong.attention.positions import Rotation
from everlong.attention.ready import ReadyTokens
from everlong.attention.ready_pool import ReadyPool
from everlong.attention.view import LayerCall, LayerView
from everlong.models.rotary import Frequencies

LENGTH, SINKS, BLOCK = 90, 3, 4
POLICY = Recall(window=24, sinks=SINKS, recalled=12, block=BLOCK, group=4)


@pytest.fixture(scope="module")
def model():
    return tiny.build("llama")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def blocks(*numbers):
    return [(SINKS + BLOCK * number, SINKS + BLOCK * (number + 1)) for number in numbers]


def read(model, cache, ids, stops, mask=None):
    with torch.no_grad():
        for begin, stop in zip(stops, stops[1:], strict=False):
            given = {} if mask is None else {"attention_mask": mask[:, :stop]}
            model(ids[:, begin:stop], **given, **tiny.cached(cache))


def memory_of(handle, model, rows=1, pad=0, stop=60):
    """Return a memory that holds some tokens, most of them in its tier, and its view."""
    cache, ids = handle.new_cache(), tiny.random_ids(rows, LENGTH)
    mask = torch.ones(rows, LENGTH, dtype=torch.long)
    mask[1:, :pad] = 0
    read(model, cache, ids, (0, stop), mask if pad else None)
    memory = next(iter(cache.memories.values()))
    pads = tuple([0] + [pad] * (rows - 1)) if pad else None
    return cache, ids, memory, pads


def view_of(memory, pads, rotation=None):
    call = LayerCall(0, rotation or Rotation(None, "halves"), pads)
    return LayerView(memory, call, memory.seen, None)


def draws(rows, seed=0, most=3, count=9):
    """Return choices of which each differs a little from the one before."""
    draw, numbers = random.Random(seed), [list(range(most)) for _ in range(rows)]
    while True:
        for some in numbers:
            for _ in range(draw.randrange(3)):
                some[draw.randrange(len(some))] = draw.randrange(count)
        yield [[blocks(*sorted(set(some)))] for some in numbers]


@pytest.mark.parametrize("precision", ["exact", "float16", "int8"])
@pytest.mark.parametrize(("rows", "pad"), [(1, 0), (2, 0), (3, 5)])
@pytest.mark.parametrize("scaling", [None, 1.0, 1.3])
def test_what_is_placed_is_what_the_base_places(model, rows, pad, precision, scaling):
    with attach(model, POLICY, tier=Tier(precision=precision)) as handle:
        _, _, memory, pads = memory_of(handle, model, rows, pad)
        frequencies = None if scaling is None else Frequencies(torch.linspace(1, 0.01, 4), scaling)
        rotation = Rotation(frequencies, "halves")
        pool, base, choices = ReadyPool(BLOCK, 3), ReadyTokens(), draws(rows)
        for _ in range(40):
            chosen, view = next(choices), view_of(memory, pads, rotation)
            found, true = (x.placed(chosen, view, 0, is_final=True) for x in (pool, base))
            assert all(torch.equal(a, b) for a, b in zip(found, true, strict=True))
            assert pool.stays(memory, rotation) == base.stays(memory, rotation)
            assert all(torch.equal(a, b) for a, b in zip(pool.standing(), true, strict=True))
        assert base._held is not None and pool._held is None, "no choice was left to the base"


def test_another_scaling_or_table_is_not_what_was_placed(model):
    with attach(model, POLICY, tier=Tier(precision="exact")) as handle:
        _, _, memory, pads = memory_of(handle, model)
        pool, chosen = ReadyPool(BLOCK, 3), [[blocks(0, 2)]]
        inverse = torch.linspace(1, 0.01, 4)
        for frequencies in (
            None,
            Frequencies(inverse, 1.3),
            Frequencies(inverse / 2, 1.3),
            Frequencies(inverse, 2.0),
        ):
            rotation = Rotation(frequencies, "halves")
            assert not pool.stays(memory, rotation) or frequencies is None
            view = view_of(memory, pads, rotation)
            found = pool.placed(chosen, view, 0, is_final=True)
            true = ReadyTokens().placed(chosen, view, 0, is_final=True)
            assert all(torch.equal(a, b) for a, b in zip(found, true, strict=True))
            assert pool.stays(memory, rotation)


def test_only_blocks_that_are_new_are_read(model):
    with attach(model, POLICY, tier=Tier(precision="exact")) as handle:
        _, _, memory, _ = memory_of(handle, model)
        view, pool, seen = view_of(memory, None), ReadyPool(BLOCK, 2), []
        view.middle = lambda begin, stop: seen.append((begin, stop)) or LayerView.middle(view, begin, stop)
        reads = (
            ((0, 1), [(3, 11)]),  # one behind the other: at once
            ((1, 4), [(19, 23)]),
            ((0, 5), [(23, 27)]),  # 0 was left shortly before
            ((1, 4), []),  # two that are wanted, two that were: four slots
            ((2, 6), [(11, 15), (27, 31)]),  # for 0 and 5, wanted longest ago
            ((1, 4), []),
            ((0, 1), [(3, 7)]),
        )
        for numbers, expected in reads:
            seen.clear()
            pool.placed([[blocks(*numbers)]], view, 0, is_final=True)
            assert seen == expected, numbers


def test_what_is_the_same_is_not_placed_again(model):
    with attach(model, POLICY, tier=Tier(precision="exact")) as handle:
        _, _, memory, _ = memory_of(handle, model)
        view, pool = view_of(memory, None), ReadyPool(BLOCK, 3)
        keys, _ = pool.placed([[blocks(0, 3)]], view, 0, is_final=True)
        keys.zero_()
        assert not pool.placed([[blocks(0, 3)]], view, 0, is_final=True)[0].any()
        again, _ = pool.placed([[blocks(0, 4)]], view, 0, is_final=False)
        assert again.any() and again.data_ptr() == keys.data_ptr()
        assert not pool.stays(memory, view.rotation), "rows whose sinks are not all there"


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_blocks_that_were_exact_are_read_again_once_they_are_coded(model, precision, monkeypatch):
    monkeypatch.setattr(tiers, "BLOCK", 6)
    with attach(model, POLICY, tier=Tier(precision=precision)) as handle:
        cache, ids, memory, _ = memory_of(handle, model, stop=61)
        pool, base = ReadyPool(BLOCK, 9), ReadyTokens()
        for stop in range(62, 80):
            read(model, cache, ids, (stop - 1, stop))
            count = len(memory.tier) // BLOCK
            chosen, view = [[blocks(0, *range(count - 3, count))]], view_of(memory, None)
            found, true = (x.placed(chosen, view, 0, is_final=True) for x in (pool, base))
            assert all(torch.equal(a, b) for a, b in zip(found, true, strict=True))
            assert pool._slots, "the others stay"


def test_what_is_no_choice_of_blocks_is_the_bases_and_back(model):
    with attach(model, POLICY, tier=Tier(precision="exact")) as handle:
        _, _, memory, _ = memory_of(handle, model)
        rotation = Rotation(Frequencies(torch.linspace(1, 0.01, 4), 1.0), "halves")
        pool, view = ReadyPool(BLOCK, 3), view_of(memory, None, rotation)
        for chosen, is_pools, *place in (
            ([[blocks(0, 2)]], True),
            ([[blocks(0, 2)]], False, 7),  # seen elsewhere
            ([[blocks(0, 2, 4, 6)]], False),  # too many
            ([[blocks(0, 2)]], True),
            ([[blocks(0), blocks(2)]], False),  # heads for themselves
            ([[[(3, 5), (8, 10)]]], False),
            ([[blocks(0, 2)]], True),
            ([[[]]], False),  # nothing but the sinks
            ([[blocks(1)]], True),
        ):
            found = pool.placed(chosen, view, sum(place), is_final=True)
            true = ReadyTokens().placed(chosen, view, sum(place), is_final=True)
            assert all(torch.equal(a, b) for a, b in zip(found, true, strict=True))
            assert (pool._pool is not None) == is_pools
            assert (pool._held is None) or not is_pools
            held = {x.untyped_storage().data_ptr(): x for x in pool.standing()} if is_pools else {}
            if is_pools:
                held |= {x.data_ptr(): x for x in pool._pool}
                assert pool.nbytes() == sum(x.nbytes for x in held.values())


def test_a_read_that_fails_leaves_nothing_that_is_said_to_be_there(model):
    with attach(model, POLICY, tier=Tier(precision="exact")) as handle:
        _, _, memory, _ = memory_of(handle, model)
        view, pool = view_of(memory, None), ReadyPool(BLOCK, 3)
        pool.placed([[blocks(0, 2)]], view, 0, is_final=True)
        broken = view_of(memory, None)
        broken.middle = lambda begin, stop: (_ for _ in ()).throw(KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            pool.placed([[blocks(0, 3)]], broken, 0, is_final=True)
        assert pool.nbytes() == 0
        found = pool.placed([[blocks(0, 3)]], view, 0, is_final=True)
        true = ReadyTokens().placed([[blocks(0, 3)]], view, 0, is_final=True)
        assert all(torch.equal(a, b) for a, b in zip(found, true, strict=True))


def test_a_copy_begins_with_nothing(model):
    with attach(model, POLICY) as handle:
        _, _, memory, _ = memory_of(handle, model)
        assert isinstance(memory.ready, ReadyPool) and memory.ready.nbytes() > 0
        twin = copy.deepcopy(memory.ready)
        assert (twin.nbytes(), twin._block, twin._most) == (0, memory.ready._block, memory.ready._most)
        memory.rollback()
        assert isinstance(memory.ready, ReadyPool) and memory.ready.nbytes() == 0


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    ("policy", "is_pool"),
    [
        (POLICY, True),
        (InfLLM(window=24, sinks=SINKS, recalled=12, block=4, representatives=2), True),
        (Quest(window=24, sinks=SINKS, recalled=12, block=4), False),
    ],
)
def test_a_stream_is_what_it_is_without_a_pool(model, policy, is_pool, rows, monkeypatch):
    """And what is ready is counted before it is there."""
    ids, found = tiny.random_ids(rows, LENGTH), []
    for pools in (True, False):
        with monkeypatch.context() as context, attach(model, policy) as handle, torch.no_grad():
            if not pools:
                context.setattr(ReadyPool, "_takes", lambda self, chosen: False)
            cache, logits = handle.new_cache(), []
            for begin, stop in zip((0, 40, *range(41, LENGTH)), (40, *range(41, LENGTH + 1)), strict=True):
                logits.append(model(ids[:, begin:stop], **tiny.cached(cache)).logits)
            found.append(torch.cat(logits, 1))
            for memory in cache.memories.values():
                assert isinstance(memory.ready, ReadyPool) == is_pool
                if pools and is_pool:
                    beside = handle.policy.nbytes_beside(0, cache.seen, memory)["window"]
                    assert beside == memory.ready.nbytes()
    assert torch.equal(*found)
