"""A written token, while what was recalled stands, by compiled kernels: what plain operations give."""

import copy

import pytest
import torch

import tests.tiny as tiny
from everlong.attention import LMInfinite, Recall, attach, compiled_standing
from everlong.attention.cache import StreamCache as Cache
from everlong.errors import StateError
from everlong.kernels import loading
from everlong.kernels.standing import Shown, Standing
from everlong.kernels.team import has_team
from everlong.models.rotary import rotate

pytestmark = pytest.mark.skipif(not (loading.wanted() and has_team()), reason="there are no kernels here")

POLICY = Recall(window=40, sinks=3, recalled=16, block=4)


@pytest.fixture
def taken(monkeypatch):
    """What each token was attended by, in each layer that it was; they are taken for few keys, too."""
    seen, attend = [], Standing.attend

    def noted(self, *given):
        seen.append(self)
        return attend(self, *given)

    monkeypatch.setattr(compiled_standing, "_LEAST", 0)
    monkeypatch.setattr(Standing, "attend", noted)
    return seen


def some(rows, heads, kv_heads, slots, stands, d, width, seed=0):
    """Return a window, what stands, and the angles of two places."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator)

    window = [
        drawn(rows, kv_heads, slots + 5, d)[:, :, :slots] if rows == 1 else drawn(rows, kv_heads, slots, d)
    ]
    window += [torch.empty_strided(window[0].shape, window[0].stride()).normal_(generator=generator)]
    window += [torch.empty_strided(window[0].shape, window[0].stride()).normal_(generator=generator)]
    stood = drawn(rows, kv_heads, stands, d), drawn(rows, kv_heads, stands, d)
    angles = [(drawn(1, width), drawn(1, width)) for _ in "hf"]
    token = drawn(rows, heads, 1, d), drawn(rows, kv_heads, 1, d), drawn(rows, kv_heads, 1, d)
    return tuple(window), stood, angles, token


def by_hand(token, window, stood, angles, slot, runs, scaling):
    """Return the attention in double precision, and the window afterwards."""
    (query, key, value), (here, far) = (x.double() for x in token), angles
    groups = query.shape[1] // key.shape[1]
    keys, values, raw = (x.double() for x in window)
    keys[:, :, slot : slot + 1] = rotate(key, *(x.double() for x in here), "halves")
    values[:, :, slot : slot + 1], raw[:, :, slot : slot + 1] = value, key
    latest = [torch.cat([x[:, :, run] for run in runs], 2) for x in (keys, values)]
    logits = [
        rotate(query, *(x.double() for x in place), "halves") @ seen.double().repeat_interleave(groups, 1).mT
        for place, seen in ((far, stood[0]), (here, latest[0]))
    ]
    weights = (torch.cat(logits, -1) * scaling).softmax(-1)
    return weights @ torch.cat((stood[1].double(), latest[1]), 2).repeat_interleave(groups, 1), (
        keys,
        values,
        raw,
    )


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize(("d", "width"), [(16, 16), (20, 12), (64, 64)])
def test_it_is_one_softmax_and_the_token_is_put_into_the_window(rows, heads, d, width, threads):
    window, stood, angles, token = some(rows, *heads, slots=300, stands=70, d=d, width=width)
    call = Standing(Shown(heads[0], *window, *stood, 200, 0.3))
    for slot, runs in (
        (9, [slice(250, 300), slice(0, 150)]),
        (199, [slice(0, 200)]),
        (299, [slice(100, 300)]),
        (0, [slice(101, 300), slice(0, 1)]),
    ):
        expected, after = by_hand(token, window, stood, angles, slot, runs, 0.3)
        found = call.attend(*token, *angles, slot, runs)
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
        for ours, theirs in zip(window, after, strict=True):
            torch.testing.assert_close(ours.double(), theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi", "gemma3_text"])
def test_what_is_written_is_what_is_written_without(family, rows, taken, monkeypatch):
    model, ids, found = tiny.build(family), tiny.random_ids(rows, 60, seed=1), []
    for takes in (True, False):
        with monkeypatch.context() as context, attach(model, POLICY) as handle, torch.no_grad():
            if not takes:
                context.setattr(compiled_standing, "standing_call", lambda *given: None)
            cache, before = handle.new_cache(), len(taken)
            model(tiny.random_ids(rows, 90), **tiny.cached(cache))
            written = [model(ids[:, at : at + 1], **tiny.cached(cache)).logits for at in range(60)]
            layers = [memory for memory in cache.memories.values() if memory.tier is not None]
            kept = [x for memory in layers for x in (memory.keys, memory.values, memory.raw)]
            tiers = [memory.tier.read(0, len(memory.tier)) for memory in layers]
            found.append([torch.cat(written, 1), *kept, *(x for both in tiers for x in both)])
            most = 45 * len(layers) if takes else 0  # one in four asks, or makes a block of the tier whole
            assert most - len(layers) <= len(taken) - before <= most
    scale = float(found[1][0].abs().max())
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * scale, rtol=1e-5)


def test_it_is_prepared_once_for_what_stays_where_it_is(taken):
    with attach(tiny.build("llama"), POLICY) as handle, torch.no_grad():
        cache = handle.new_cache()
        handle.model(tiny.random_ids(1, 90), **tiny.cached(cache))
        for at in range(40):
            handle.model(tiny.random_ids(1, 1, seed=at), **tiny.cached(cache))
        assert len(taken) >= 29 * len(cache.memories)
        assert len(set(taken)) <= 2 * len(cache.memories), "the first step lies elsewhere"
        memory = cache.memories[0]
        shown = [x for x in memory.ready.call._shown if isinstance(x, torch.Tensor)]
        theirs = memory.keys, memory.values, memory.raw, *memory.ready.standing()
        assert all(one is other for one, other in zip(shown, theirs, strict=True))
        assert not any(isinstance(x, torch.Tensor) for x in vars(memory.ready.call).values()), "nothing else"
        twin = copy.deepcopy(cache)
        assert all(memory.ready.call is None for memory in twin.memories.values())
        ready = cache.memories[0].ready
        assert ready.call is not None
        ready._empty()
        assert ready.call is None, "it would hold on to what nobody shows any more"


def test_threads_that_become_more_are_all_given_room(taken):
    window, stood, angles, token = some(1, 6, 2, slots=300, stands=70, d=16, width=16)
    shown, before = Shown(6, *window, *stood, 200, 0.3), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = compiled_standing.standing_call(None, shown, *token)
        assert compiled_standing.standing_call(one, shown, *token) is one
        torch.set_num_threads(3)
        three = compiled_standing.standing_call(one, shown, *token)
        assert three is not one
        runs = [slice(100, 300)]
        expected, _ = by_hand(token, window, stood, angles, 299, runs, 0.3)
        torch.testing.assert_close(
            three.attend(*token, *angles, 299, runs).double(), expected, atol=1e-5, rtol=1e-5
        )
    finally:
        torch.set_num_threads(before)


def test_what_kernels_do_not_take_is_left_to_pytorch(taken, monkeypatch):
    window, stood, (here, far), token = some(1, 6, 2, slots=300, stands=70, d=16, width=16)
    shown = Shown(6, *window, *stood, 200, 0.3)
    assert compiled_standing.standing_call(None, shown, *token) is not None
    for other in (
        (token[0].double(), *token[1:]),
        (token[0][:, :5], *token[1:]),
        (token[0], token[1], token[2].mT),
    ):
        assert compiled_standing.standing_call(None, shown, *other) is None
    apart = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in window)
    for changes in (
        dict(zip(("keys", "values", "raw"), apart, strict=True)),
        {"raw": apart[2]},
        {"stood_values": stood[1][:, :, 1:]},
        {"heads": 5},
    ):
        assert shown.fits and not shown._replace(**changes).fits
    assert compiled_standing.turns("halves", 16, here, far) and not compiled_standing.turns(
        "interleaved", 16, here, far
    )
    assert not compiled_standing.turns("halves", 16, here, None)
    assert not compiled_standing.turns("halves", 15, here, far), "wider than a head"
    assert not compiled_standing.turns("halves", 16, here, (far[0][:, :8], far[1][:, :8]))
    assert not compiled_standing.turns("halves", 16, here, (far[0].double(), far[1].double()))
    monkeypatch.setattr(compiled_standing, "_LEAST", 2 * 16 * 270 + 1)
    assert compiled_standing.standing_call(None, shown, *token) is None, "few keys"


@pytest.mark.parametrize(
    ("slot", "runs"),
    [
        (300, [slice(100, 300)]),
        (0, [slice(100, 299)]),
        (0, [slice(200, 300)] * 3),
        (0, [slice(150, 350)]),
        (0, []),
    ],
)
def test_places_that_a_window_does_not_have_are_refused(slot, runs):
    window, stood, angles, token = some(1, 6, 2, slots=300, stands=70, d=16, width=16)
    call = Standing(Shown(6, *window, *stood, 200, 0.3))
    before = [x.clone() for x in window]
    with pytest.raises(StateError, match="does not take"):
        call.attend(*token, *angles, slot, runs)
    assert all(torch.equal(one, other) for one, other in zip(window, before, strict=True))


def test_soft_caps_and_other_policies_never_ask(taken):
    for family, policy in (("gemma2", POLICY), ("llama", LMInfinite(window=40, sinks=3))):
        with attach(tiny.build(family), policy) as handle, torch.no_grad():
            cache = handle.new_cache()
            handle.model(tiny.random_ids(1, 90), **tiny.cached(cache))
            for at in range(8):
                handle.model(tiny.random_ids(1, 1, seed=at), **tiny.cached(cache))
    assert taken == []


def test_kernels_that_are_wrong_are_left_with_a_warning(taken, monkeypatch):
    monkeypatch.setattr(Standing, "attend", lambda self, query, *_: torch.zeros_like(query))
    monkeypatch.setattr(compiled_standing, "_is_right", compiled_standing._is_right.__wrapped__)
    window, stood, _, token = some(1, 6, 2, slots=300, stands=70, d=16, width=16)
    with pytest.warns(UserWarning, match="attend wrongly"):
        assert compiled_standing.standing_call(None, Shown(6, *window, *stood, 200, 0.3), *token) is None


@pytest.mark.parametrize("kind", [Cache.state, Cache.fork], ids=["restored", "forked"])
def test_a_stream_that_is_taken_up_again_goes_on_within_rounding(kind, taken):
    with attach(tiny.build("llama"), POLICY) as handle, torch.no_grad():
        cache = handle.new_cache()
        for tokens in (90, *[1] * 7):
            handle.model(tiny.random_ids(1, tokens), **tiny.cached(cache))
        other = handle.restore_cache(*kind(cache)) if kind is Cache.state else kind(cache)
        for at in range(12):
            ids = tiny.random_ids(1, 1, seed=at)
            found, again = (handle.model(ids, **tiny.cached(each)).logits for each in (cache, other))
            torch.testing.assert_close(found, again, atol=1e-5 * float(found.abs().max()), rtol=0)
    assert taken
