"""Toys that show what the seam carries: tokens taken back, a policy of one's own, recall, surprisal.

Each recalling toy is held against the brute-force reference, which is told in `places` where its keys stand.
"""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import tests.reference.attention as brute_force
import tests.tiny as tiny
from everlong.attention import (
    POLICIES,
    LMInfinite,
    Policy,
    StreamingLLM,
    attach,
    make_policy,
    policy_options,
)
from everlong.attention.layer_memory import LayerMemory
from everlong.attention.parts import Part
from everlong.errors import ConfigurationError, StateError, UnknownNameError, UnsupportedUseError
from tests.attention.my_policy import DilatedWindow
from tests.reference.attention import ReferenceSpec
from tests.reference.model import reference_logits

WINDOW, LENGTH = 24, 60
EDGES = {
    "one call": (0, LENGTH),
    "chunks": (0, 5, 25, 26, 51, LENGTH),
    "token by token": tuple(range(LENGTH + 1)),
}


@pytest.fixture(scope="module")
def model():
    return tiny.build("llama")


@pytest.fixture(scope="module")
def ids():
    return tiny.random_ids(1, LENGTH)


@torch.no_grad()
def feed(model, cache, ids, edges):
    pieces = [
        model(ids[:, begin:stop], **tiny.cached(cache)).logits
        for begin, stop in zip(edges, edges[1:], strict=False)
    ]
    return torch.cat(pieces, 1)


def close(ours, expected):
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def reference(monkeypatch, model, ids, places, mask=None):
    """Logits where query i sees key j as `places(i, j)` says: the two places, or None."""
    monkeypatch.setattr(brute_force, "places", lambda spec, i, j, *_: places(i, j) if j <= i else None)
    return reference_logits(model, ids, ReferenceSpec(), mask)


# --- tokens taken back --------------------------------------------------------------------------------

TAKING_BACK = {
    "lm-infinite": LMInfinite(window=WINDOW, sinks=3),
    "low ceiling": LMInfinite(window=WINDOW, sinks=3, ceiling=9),
    "top_k": LMInfinite(window=WINDOW, sinks=3, top_k=2, top_k_layers=0),
    "streaming-llm": StreamingLLM(window=WINDOW),
}


@pytest.fixture(params=TAKING_BACK)
def handle(request, model):
    with attach(model, TAKING_BACK[request.param]) as attached, torch.no_grad():
        yield attached


@pytest.mark.parametrize(
    "read", [2, 20, LENGTH], ids=["among the sinks", "before the ring is full", "after it turned"]
)
def test_eight_tokens_taken_back_leave_no_trace(model, handle, ids, read):
    guess, later = tiny.random_ids(1, 8, seed=5), tiny.random_ids(1, 20, seed=6)
    cache, untouched = handle.new_cache(), handle.new_cache()
    for stream in (cache, untouched):
        feed(model, stream, ids, (0, read))
    with cache.provisional():
        model(guess, **tiny.cached(cache))
    assert (cache.seen, cache.forgotten) == (read + 8, untouched.forgotten)
    cache.rollback()
    assert (cache.seen, cache.kept, cache.bytes()) == (read, untouched.kept, untouched.bytes())
    edges = (0, 1, 2, 13, 20)
    assert torch.equal(feed(model, cache, later, edges), feed(model, untouched, later, edges))


@pytest.mark.parametrize(
    "read", [2, 20, LENGTH], ids=["among the sinks", "before the ring is full", "after it turned"]
)
@pytest.mark.parametrize("accepted", [0, 1, 5, 8])
def test_a_partly_committed_guess_is_a_stream_that_read_only_that_part(model, handle, ids, read, accepted):
    guess, later = tiny.random_ids(1, 8, seed=5), tiny.random_ids(1, 20, seed=6)
    cache, straight = handle.new_cache(), handle.new_cache()
    for stream in (cache, straight):
        feed(model, stream, ids, (0, read))
    with cache.provisional():
        seen = model(guess, **tiny.cached(cache)).logits
    cache.commit(list(range(accepted)))
    if accepted:
        close(seen[:, :accepted], feed(model, straight, guess[:, :accepted], range(accepted + 1)))
    assert (cache.seen, cache.kept, cache.recallable) == (straight.seen, straight.kept, straight.recallable)
    edges = (0, 1, 2, 13, 20)
    close(feed(model, cache, later, edges), feed(model, straight, later, edges))


def test_a_guess_read_token_by_token_and_committed_whole(model, handle, ids):
    guess, later = tiny.random_ids(1, 8, seed=5), tiny.random_ids(1, 20, seed=6)
    cache, straight = handle.new_cache(), handle.new_cache()
    for stream in (cache, straight):
        feed(model, stream, ids, (0, LENGTH))
    with cache.provisional():
        ours = feed(model, cache, guess, (0, 1, 2, 5, 8))
    cache.commit()
    close(ours, feed(model, straight, guess, (0, 8)))
    close(feed(model, cache, later, (0, 1, 20)), feed(model, straight, later, (0, 1, 20)))


def test_any_subset_of_a_guess_may_be_kept(ids):
    """With one layer a token's keys depend on itself alone, so that any subset is a stream of its own."""
    single = tiny.build("llama", num_hidden_layers=1)
    guess, later = tiny.random_ids(1, 8, seed=5), tiny.random_ids(1, 20, seed=6)
    which = [1, 2, 6]
    with attach(single, LMInfinite(window=WINDOW, sinks=3)) as handle:
        cache, straight = handle.new_cache(), handle.new_cache()
        for stream in (cache, straight):
            feed(single, stream, ids, (0, LENGTH))
        with cache.provisional(), torch.no_grad():
            single(guess, **tiny.cached(cache))
        cache.commit(which)
        feed(single, straight, guess[:, which], (0, 3))
        close(feed(single, cache, later, (0, 1, 20)), feed(single, straight, later, (0, 1, 20)))


def test_guesses_in_padded_rows_and_one_after_the_other(model, handle):
    batch, mask = tiny.left_padded([LENGTH, 30])
    guess = tiny.random_ids(2, 8, seed=5)
    cache, straight = handle.new_cache(), handle.new_cache()
    for stream in (cache, straight):
        model(batch, attention_mask=mask, **tiny.cached(stream))
    for accepted in (3, 0, 8):
        with cache.provisional():
            model(guess, **tiny.cached(cache))
        cache.commit(list(range(accepted)))
        if accepted:
            model(guess[:, :accepted], **tiny.cached(straight))
    close(feed(model, cache, guess, (0, 1, 8)), feed(model, straight, guess, (0, 1, 8)))


def test_an_open_guess_must_be_decided_first(model, handle, ids):
    cache = handle.new_cache()
    with cache.provisional():
        model(ids[:, :8], **tiny.cached(cache))
    with pytest.raises(StateError, match=r"commit\(\) or rollback\(\) first"):
        model(ids[:, :1], **tiny.cached(cache))
    with pytest.raises(StateError, match="provisional"):
        cache.state()
    for wrong in ([8], [-1], [0, 0]):
        with pytest.raises(StateError, match="8 provisional tokens"):
            cache.commit(wrong)
    cache.rollback()
    model(ids[:, :1], **tiny.cached(cache))
    cache.rollback()
    cache.commit()
    assert cache.seen == 1, "with nothing provisional, both do nothing"


# --- a policy of one's own ------------------------------------------------------------------------------


@pytest.mark.parametrize("edges", EDGES.values(), ids=EDGES)
def test_a_policy_outside_the_package_equals_its_definition(monkeypatch, model, edges):
    policy = DilatedWindow(near=6, stride=3, window=WINDOW)
    batch, mask = tiny.left_padded([LENGTH, LENGTH - 9])
    with attach(model, policy) as handle, torch.no_grad():
        cache = handle.new_cache()
        ours = torch.cat(
            [
                model(batch[:, a:b], attention_mask=mask[:, :b], **tiny.cached(cache)).logits
                for a, b in zip(edges, edges[1:], strict=False)
            ],
            1,
        )

    def places(i, j):
        return (i, j) if i - j < 6 or (i - j < WINDOW and (i - j) % 3 == 0) else None

    expected = reference(monkeypatch, model, batch, places, mask)
    close(ours[mask.bool()], expected[mask.bool()])
    assert cache.kept == WINDOW and cache.forgotten == LENGTH - WINDOW


def test_a_policy_outside_the_package_is_made_by_name(model, ids):
    assert "dilated-window" in POLICIES
    policy = make_policy("dilated-window", {"near": "6", "stride": 3})
    assert policy == DilatedWindow(near=6, stride=3)
    assert policy_options(policy) == ("dilated-window", {"near": 6, "stride": 3, "window": None})
    with pytest.raises(UnknownNameError, match="stride"):
        make_policy("dilated-window", {"strid": 3})
    with pytest.raises(UnknownNameError, match="dilated-window"):
        make_policy("dilated-windows")
    with pytest.raises(ConfigurationError, match="at least 1"):
        make_policy("dilated-window", {"near": 0})
    with attach(model, policy) as handle:
        assert handle.policy.window == tiny.TRAINING_LENGTH
        assert model.generate(ids, max_new_tokens=9, do_sample=False).shape == (1, LENGTH + 9)


def test_a_policy_outside_the_package_is_saved_and_generates(model, ids):
    with attach(model, DilatedWindow(near=6, stride=3, window=WINDOW)) as handle, torch.no_grad():
        cache = tiny.cache_of(model(ids))
        tensors, meta = cache.state()
        written = model.generate(ids, max_new_tokens=9, do_sample=False)
        without = model.generate(ids, max_new_tokens=9, do_sample=False, use_cache=False)
        assert torch.equal(written, without)
        restored = handle.restore_cache(tensors, meta)
        assert torch.equal(
            model(ids[:, :5], **tiny.cached(restored)).logits,
            model(ids[:, :5], **tiny.cached(cache)).logits,
        )


# --- recall of an evicted block ---------------------------------------------------------------------------


@dataclass(frozen=True)
class RecallsABlock(Policy):
    """The latest `window` tokens, and of what left them one block, seen at a fixed distance from the tier."""

    window: int | None = WINDOW
    begin: int = 6
    size: int = 8
    distance: int = 11

    def memory(self, layer, start):
        return LayerMemory(sinks=0, local=self.window, keep_middle=True, start=start)

    def parts(self, queries, view):
        parts = view.band(queries, farthest=self.window - 1)
        if view.memory.tier.first <= self.begin and len(view.memory.tier) >= self.begin + self.size:
            keys, values = view.memory.tier.read(self.begin, self.begin + self.size)
            parts.append(Part(queries.at(self.distance), view.rotation(keys, 0), values))
        return parts


@pytest.mark.parametrize(
    "edges", [EDGES["chunks"], EDGES["token by token"]], ids=["chunks", "token by token"]
)
def test_a_policy_that_recalls_an_evicted_block(monkeypatch, model, ids, edges):
    """A block is recalled from the forward after the one in which it left, or by the token that pushes it."""
    policy = RecallsABlock()
    with attach(model, policy) as handle:
        cache = handle.new_cache()
        ours = feed(model, cache, ids, edges)
    assert (cache.kept, cache.recallable, cache.forgotten) == (WINDOW, LENGTH - WINDOW, 0)
    assert cache.bytes()["ram"] > 0

    evicted_from = (
        policy.begin + policy.size - 1 + WINDOW  # the first query that does not see the block's last
    )
    if len(edges) <= LENGTH:
        evicted_from = next(edge for edge in edges if edge > evicted_from)
    assert 0 < evicted_from < LENGTH

    def places(i, j):
        if i - j < WINDOW:
            return (i, j)
        is_recalled = i >= evicted_from and policy.begin <= j < policy.begin + policy.size
        return (policy.distance, 0) if is_recalled else None

    close(ours, reference(monkeypatch, model, ids, places))


# --- surprisal ----------------------------------------------------------------------------------------


class RemembersAnIndex(LayerMemory):
    """A memory with something of its own: the most surprising token so far."""

    surprising: int | None = None
    surprise = 0.0


@dataclass(frozen=True)
class RecallsTheMostSurprising(Policy):
    """The latest `window` tokens, and the most surprising token that left them, at a fixed distance."""

    needs_surprisal: ClassVar[bool] = True

    window: int | None = WINDOW
    distance: int = 11

    def memory(self, layer, start):
        return RemembersAnIndex(sinks=0, local=self.window, keep_middle=True, start=start)

    def after_forward(self, cache, tokens, surprisal):
        most = surprisal[0].max().item()
        for memory in cache.memories.values():
            if most > memory.surprise:
                memory.surprise, memory.surprising = (
                    most,
                    cache.seen - tokens.shape[1] + int(surprisal[0].argmax()),
                )

    def parts(self, queries, view):
        parts = view.band(queries, farthest=self.window - 1)
        index = view.memory.surprising
        if index is not None and index < len(view.memory.tier):
            keys, values = view.memory.tier.read(index, index + 1)
            parts.append(Part(queries.at(self.distance), view.rotation(keys, 0), values))
        return parts


def test_a_policy_that_needs_surprisal_is_refused_where_nobody_reports_it(model, ids):
    with attach(model, RecallsTheMostSurprising()), torch.no_grad():
        for use in (
            lambda: model(ids),
            lambda: model(ids, use_cache=False),
            lambda: model.generate(ids, max_new_tokens=2),
        ):
            with pytest.raises(
                UnsupportedUseError, match="RecallsTheMostSurprising needs the surprisal.*session"
            ):
                use()


def test_a_policy_that_needs_surprisal_works_where_it_is_told(monkeypatch, model, ids):
    chosen = {4: 5.0, 16: 3.0, 33: 7.0}  # 4 leaves the window with token 28, 33 with token 57
    surprisal = torch.tensor([[chosen.get(index, 1.0) for index in range(LENGTH)]])
    with attach(model, RecallsTheMostSurprising()) as handle:
        cache = handle.new_cache()
        assert cache.needs_surprisal
        pieces = []
        for index in range(LENGTH):
            pieces.append(feed(model, cache, ids[:, index : index + 1], (0, 1)))
            cache.after_forward(ids[:, index : index + 1], surprisal[:, index : index + 1])
    ours = torch.cat(pieces, 1)

    def most_surprising(i):
        """What is known when token i is read."""
        return int(surprisal[0, :i].argmax()) if i else None

    def places(i, j):
        if i - j < WINDOW:
            return (i, j)
        return (11, 0) if j == most_surprising(i) else None

    recalled = {most_surprising(i) for i in range(WINDOW, LENGTH) if most_surprising(i) <= i - WINDOW}
    assert recalled == {4, 33}
    close(ours, reference(monkeypatch, model, ids, places))
