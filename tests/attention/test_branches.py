"""Tokens that follow in several ways at once: each as if its branch had been run alone."""

import pytest
import torch

import tests.tiny as tiny
from everlong.attention import FullAttention, LMInfinite, StreamingLLM, attach
from everlong.attention.branches import Branches
from everlong.errors import ConfigurationError, InputError, StateError, UnsupportedUseError

CASES = {
    "lm-infinite": ("llama", LMInfinite(window=24, sinks=3)),
    "low ceiling": ("llama", LMInfinite(window=24, sinks=3, ceiling=9)),
    "no ceiling": ("llama", LMInfinite(window=24, sinks=3, ceiling=None)),
    "no sinks": ("llama", LMInfinite(window=24, sinks=0)),
    "top_k": ("llama", LMInfinite(window=24, sinks=3, top_k=2, top_k_layers=0)),
    "streaming-llm": ("llama", StreamingLLM(window=24)),
    "full": ("llama", FullAttention()),
    "local layers": ("gemma3_text", LMInfinite(window=24, sinks=3)),
    "shared layers": ("gemma4_text", LMInfinite(window=24, sinks=3)),
    "partial rotary": ("gpt_neox", LMInfinite(window=24, sinks=3)),
    "scaled by position": ("ministral3", LMInfinite(window=24, sinks=3)),
}
PARENTS = [-1, 0, 1, 1, 0, 4, 2, -1, 7, 3, 9]


@pytest.fixture(scope="module", params=CASES)
def handle(request):
    family, policy = CASES[request.param]
    with attach(tiny.build(family), policy) as attached, torch.no_grad():
        yield attached


def path_to(number, parents=PARENTS):
    return [] if number < 0 else [*path_to(parents[number], parents), number]


def close(ours, expected):
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def begun(handle, length):
    cache = handle.new_cache()
    handle.model(tiny.random_ids(1, length, seed=length), **tiny.cached(cache))
    return cache


@pytest.mark.parametrize("length", [5, 20, 23, 24, 26, 70])
def test_each_token_sees_its_own_branch_alone(handle, length):
    cache = begun(handle, length)
    ids = tiny.random_ids(1, len(PARENTS), seed=1)
    with cache.provisional(Branches(PARENTS)):
        together = handle.model(ids, **tiny.cached(cache)).logits[0]
    for number in range(len(PARENTS)):
        path = path_to(number)
        alone = begun(handle, length)
        close(together[number], handle.model(ids[:, path], **tiny.cached(alone)).logits[0, -1])


@pytest.mark.parametrize("length", [5, 23, 70])
def test_a_branch_that_is_committed_is_as_if_it_had_been_run(handle, length):
    ids = tiny.random_ids(1, len(PARENTS), seed=1)
    for number in (0, 6, 10):
        cache, alone = begun(handle, length), begun(handle, length)
        for _ in range(2):
            with cache.provisional(Branches(PARENTS)):
                handle.model(ids, **tiny.cached(cache))
            cache.commit(path_to(number))
            handle.model(ids[:, path_to(number)], **tiny.cached(alone))
        assert cache.seen == alone.seen
        more = tiny.random_ids(1, 3, seed=2)
        close(
            handle.model(more, **tiny.cached(cache)).logits, handle.model(more, **tiny.cached(alone)).logits
        )


def test_branches_that_are_rolled_back_leave_nothing(handle):
    cache, alone = begun(handle, 50), begun(handle, 50)
    with cache.provisional(Branches(PARENTS)):
        handle.model(tiny.random_ids(1, len(PARENTS), seed=1), **tiny.cached(cache))
    cache.rollback()
    more = tiny.random_ids(1, 3, seed=2)
    assert torch.equal(
        handle.model(more, **tiny.cached(cache)).logits, handle.model(more, **tiny.cached(alone)).logits
    )


def test_branches_know_depth_and_sight():
    branches = Branches([-1, 0, 0, 2])
    assert branches.depths.tolist() == [0, 1, 1, 2] and branches.height == 3 and len(branches) == 4
    assert [[j for j in range(4) if branches.sees[i, j]] for i in range(4)] == [
        [0],
        [0, 1],
        [0, 2],
        [0, 2, 3],
    ]
    for parents in ([], [0], [-1, 2], [-2]):
        with pytest.raises(ConfigurationError, match="follows"):
            Branches(parents)


def test_a_policy_that_defines_its_parts_anew_says_anew_what_they_can():
    class Own:
        def parts(self, queries, view):
            return super().parts(queries, view)

    class Mixed(Own, LMInfinite):
        pass

    class Direct(LMInfinite):
        def parts(self, queries, view):
            return super().parts(queries, view)

    class Again(Direct):
        takes_branches = True
        in_place = LMInfinite.in_place

    for kind, can in ((LMInfinite, True), (Mixed, False), (Direct, False), (Again, True)):
        policy = kind(window=24, sinks=3).resolve(64)
        assert kind.takes_branches is can and (policy.in_place(5, 5) is not None) is can, kind


def test_branches_are_refused_where_they_cannot_follow():
    class Plain(LMInfinite):
        takes_branches = False

    with attach(tiny.build("llama"), LMInfinite(window=24, sinks=3)) as handle, torch.no_grad():
        ids = tiny.random_ids(1, 3)
        two = Branches([-1, 0, 0])
        with pytest.raises(UnsupportedUseError, match="sinks"), handle.new_cache().provisional(two):
            pass
        cache = begun(handle, 9)
        with cache.provisional(two), pytest.raises(InputError, match="3 tokens, the input 2"):
            handle.model(ids[:, :2], **tiny.cached(cache))
        cache = begun(handle, 9)
        with cache.provisional(two):
            handle.model(ids, **tiny.cached(cache))
            with pytest.raises(StateError, match="one forward"):
                handle.model(ids, **tiny.cached(cache))
        with pytest.raises(UnsupportedUseError, match="settled"), cache.provisional(two):
            pass
        plain = handle.new_cache(Plain(window=24, sinks=3))
        handle.model(tiny.random_ids(1, 9), **tiny.cached(plain))
        with pytest.raises(UnsupportedUseError, match="Plain"), plain.provisional(two):
            pass
