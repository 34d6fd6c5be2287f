"""Streams of any length together, packed into one row or as the rows of a batch: each as if it were alone."""

import pytest
import torch

import tests.tiny as tiny
from everlong.attention import FullAttention, LMInfinite, StreamingLLM, attach
from everlong.attention import batch as batch_module
from everlong.attention.parts import attend_all
from everlong.attention.positions import FRAME
from everlong.attention.sequences import PackedSequences
from everlong.errors import InputError, StateError, UnsupportedUseError

CASES = {
    "lm-infinite": ("llama", LMInfinite(window=24, sinks=3)),
    "low ceiling": ("llama", LMInfinite(window=24, sinks=3, ceiling=9)),
    "ceiling between": ("llama", LMInfinite(window=24, sinks=3, ceiling=21)),
    "high ceiling": ("llama", LMInfinite(window=24, sinks=3, ceiling=40)),
    "no ceiling": ("llama", LMInfinite(window=24, sinks=3, ceiling=None)),
    "no sinks": ("llama", LMInfinite(window=24, sinks=0)),
    "streaming-llm": ("llama", StreamingLLM(window=24)),
    "full": ("llama", FullAttention()),
    "yarn": ("llama yarn", LMInfinite(window=24, sinks=3)),
    "local layers": ("gemma3_text", LMInfinite(window=24, sinks=3)),
    "shared layers": ("gemma4_text", LMInfinite(window=24, sinks=3)),
    "partial rotary": ("gpt_neox", LMInfinite(window=24, sinks=3)),
    "no rotary in a layer": ("smollm3", LMInfinite(window=24, sinks=3)),
    "attention sinks in the weights": ("gpt_oss", LMInfinite(window=24, sinks=3)),
}
LENGTHS = [70, 24, 25, 60, 2, 23, 7]  # beyond the window, at its edge, below, fewer than sinks


def built(family):
    return tiny.build("llama", **tiny.YARN) if family == "llama yarn" else tiny.build(family)


@pytest.fixture(scope="module", params=CASES)
def handle(request):
    family, policy = CASES[request.param]
    with attach(built(family), policy) as attached, torch.no_grad():
        yield attached


def ids_of(length, seed):
    return tiny.random_ids(1, length, seed=seed)


def alone(handle, lengths, policy=None):
    """One cache a length, each having read its own tokens."""
    caches = []
    for row, length in enumerate(lengths):
        cache = handle.new_cache(policy)
        handle.model(ids_of(length, row), **tiny.cached(cache))
        caches.append(cache)
    return caches


def steps(handle, cache, rows, count, seed=50):
    """Logits after each of `count` single tokens, (rows, count, vocabulary); other tokens in each row."""
    ids = torch.cat([ids_of(count, seed + row) for row in rows])
    return torch.cat(
        [handle.model(ids[:, at : at + 1], **tiny.cached(cache)).logits for at in range(count)], 1
    )


def half_done(handle):
    """A cache whose last forward ended in an error."""
    (cache,) = alone(handle, [9])
    hook = handle.decoder.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        handle.model(ids_of(1, 0), **tiny.cached(cache))
    hook.remove()
    return cache


def close(ours, expected):
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


# --- rows of a batch ----------------------------------------------------------------------------------


@pytest.mark.thin
@pytest.mark.parametrize("lengths", [LENGTHS, [7, 2, 20], [500, 60, 60], [60, 60]], ids=str)
def test_rows_of_a_batch_write_as_they_would_alone_and_go_on_alone(handle, lengths):
    caches = alone(handle, lengths)
    rows = range(len(lengths))
    batch = handle.batch(caches)
    together = steps(handle, batch.cache, rows, 30)
    taken = [batch.take(row) for row in rows]
    for row in rows:
        close(together[row : row + 1], steps(handle, caches[row], [row], 30))
        assert (taken[row].seen, taken[row].kept) == (caches[row].seen, caches[row].kept)
        close(steps(handle, taken[row], [row], 30, seed=90), steps(handle, caches[row], [row], 30, seed=90))
        chunk = ids_of(9, 200)
        close(*(handle.model(chunk, **tiny.cached(cache)).logits for cache in (taken[row], caches[row])))


def test_rows_may_leave_and_the_others_go_on(handle):
    caches = alone(handle, [70, 24, 5])
    batch = handle.batch(caches)
    steps(handle, batch.cache, [0, 1, 2], 3)
    left = batch.take(0)
    batch.keep([2, 1])
    together = steps(handle, batch.cache, [2, 1], 30, seed=70)
    for row, place in ((2, 0), (1, 1)):
        steps(handle, caches[row], [row], 3)
        close(together[place : place + 1], steps(handle, caches[row], [row], 30, seed=70))
        assert batch.take(place).seen == caches[row].seen
    steps(handle, caches[0], [0], 3)
    close(steps(handle, left, [0], 5, seed=70), steps(handle, caches[0], [0], 5, seed=70))


def test_a_batch_is_a_copy_and_so_is_what_is_taken(handle):
    caches = alone(handle, [30, 9])
    before = [cache.fork() for cache in caches]
    batch = handle.batch(caches)
    taken = batch.take(1)
    steps(handle, batch.cache, [0, 1], 5)
    for cache, kept in zip((*caches, taken), (*before, before[1].fork()), strict=True):
        close(steps(handle, cache, [0], 5, seed=70), steps(handle, kept, [0], 5, seed=70))


def test_streams_may_move_into_a_batch_instead(handle, monkeypatch):
    caches = alone(handle, [70, 9])
    copied = steps(handle, handle.batch(caches).cache, [0, 1], 30)
    held, fill = [], batch_module._fill

    def watched(into, *rest):
        held.append(sum(cache.bytes()["window"] for cache in caches))
        fill(into, *rest)

    monkeypatch.setattr(batch_module, "_fill", watched)
    batch = handle.batch(caches, moved=True)
    assert held == sorted(held, reverse=True) and held[-1] < held[0]
    assert not any(sum(cache.bytes().values()) for cache in caches) and [cache.seen for cache in caches] == [
        70,
        9,
    ]
    assert torch.equal(steps(handle, batch.cache, [0, 1], 30), copied)
    with pytest.raises(StateError, match="is in a batch now"):
        steps(handle, caches[0], [0], 1)
    with pytest.raises(StateError, match="is in a batch now"):
        caches[1].state()


def test_what_is_taken_can_be_saved_and_batched_again(handle):
    caches = alone(handle, [70, 9])
    for _ in range(3):
        batch = handle.batch(caches)
        steps(handle, batch.cache, [0, 1], 4)
        caches = [batch.take(row) for row in (0, 1)]
    caches = [handle.restore_cache(*cache.state()) for cache in caches]
    for row, length in enumerate((70, 9)):
        expected = alone(handle, [70, 9])[row]
        for _ in range(3):
            steps(handle, expected, [row], 4)
        assert caches[row].seen == length + 12
        close(steps(handle, caches[row], [row], 5, seed=70), steps(handle, expected, [row], 5, seed=70))


def test_streams_may_begin_at_offsets_of_their_own():
    with attach(tiny.build("llama"), LMInfinite(window=24, sinks=3)) as handle, torch.no_grad():
        caches = [handle.new_cache(), handle.new_cache(offset=200_000_000), handle.new_cache(offset=7)]
        for cache, length in zip(caches, (72, 40, 5), strict=True):
            handle.model(ids_of(length, length), **tiny.cached(cache))
        batch = handle.batch(caches)
        together = steps(handle, batch.cache, [0, 1, 2], 40)
        for row, cache in enumerate(caches):
            taken = batch.take(row)
            assert taken.offset == cache.offset
            close(together[row : row + 1], steps(handle, cache, [row], 40))
            close(steps(handle, taken, [row], 9, seed=70), steps(handle, cache, [row], 9, seed=70))


def test_a_batch_moves_its_frame_with_the_window(monkeypatch):
    monkeypatch.setattr("everlong.attention.layer_memory.FRAME", 100)
    assert FRAME > 100
    with attach(tiny.build("llama"), LMInfinite(window=24, sinks=3)) as handle, torch.no_grad():
        caches = alone(handle, [90, 5])
        batch = handle.batch(caches)
        together = steps(handle, batch.cache, [0, 1], 150)
        for row, cache in enumerate(caches):
            close(together[row : row + 1], steps(handle, cache, [row], 150))
            close(steps(handle, batch.take(row), [row], 9, seed=70), steps(handle, cache, [row], 9, seed=70))


def test_full_windows_attend_to_their_own_buffers(monkeypatch):
    """Once all rows are full, a step takes the shortest way: no parts, no copies."""
    seen = []

    def watched(query, keys, values, **manner):
        seen.append((keys.data_ptr(), values.data_ptr()))
        return attend_all(query, keys, values, **manner)

    monkeypatch.setattr("everlong.attention.token_step.attend_all", watched)
    with attach(tiny.build("llama"), LMInfinite(window=24, sinks=3)) as handle, torch.no_grad():
        batch = handle.batch(alone(handle, [70, 40]))
        steps(handle, batch.cache, [0, 1], 5)
        buffers = [(m.keys.data_ptr(), m.values.data_ptr()) for m in batch.cache.memories.values()]
        assert seen == buffers * 5


def test_decoding_a_turned_batch_copies_no_window():
    """Rows of different lengths attend in place: one part, the memory's own buffers."""
    seen = []

    class Watching(LMInfinite):
        def parts(self, queries, view):
            parts = super().parts(queries, view)
            if view.new is None:
                seen.append(all(part.keys.data_ptr() == view.memory.keys.data_ptr() for part in parts))
            return parts

    with attach(tiny.build("llama"), Watching(window=24, sinks=3)) as handle, torch.no_grad():
        batch = handle.batch(alone(handle, [70, 9]))
        seen.clear()
        steps(handle, batch.cache, [0, 1], 40)
        assert seen and all(seen)


@pytest.mark.parametrize(
    "make, why",
    [
        (lambda h: [*alone(h, [9]), *alone(h, [9], LMInfinite(window=20, sinks=3))], "different policies"),
        (lambda h: [*alone(h, [9]), h.new_cache()], "not read anything"),
        (lambda h: alone(h, [9, 9], LMInfinite(window=20, top_k=2, top_k_layers=0)), "kept in a way"),
        (lambda h: [*alone(h, [9]), half_done(h)], "ended in an error"),
    ],
    ids=["policies", "empty", "tier", "half-done"],
)
def test_streams_that_cannot_be_rows_are_refused_with_the_reason(make, why):
    with attach(tiny.build("llama"), LMInfinite(window=24, sinks=3)) as handle, torch.no_grad():
        caches = make(handle)
        with pytest.raises(UnsupportedUseError, match=why):
            handle.batch(caches)


def test_rows_of_models_whose_tables_follow_the_length_are_refused_until_all_are_full():
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}
    with attach(tiny.build("llama", **dynamic), LMInfinite(window=90)) as handle, torch.no_grad():
        with pytest.raises(UnsupportedUseError, match="depend on the length"):
            handle.batch(alone(handle, [95, 80]))
        caches = alone(handle, [95, 120])
        batch = handle.batch(caches)
        together = steps(handle, batch.cache, [0, 1], 9)
        for row, cache in enumerate(caches):
            close(together[row : row + 1], steps(handle, cache, [row], 9))


# --- packed into one row ------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[5, 1, 30, 2, 9, 40, 3], [1] * 7], ids=["chunks", "single tokens"])
def test_packed_sequences_read_as_they_would_alone(handle, counts):
    caches = alone(handle, LENGTHS)
    caches[-1] = handle.new_cache()  # one that has read nothing yet
    expected = [cache.fork() for cache in caches]
    for turn in range(2):
        pieces = [ids_of(count, 80 + row + 10 * turn) for row, count in enumerate(counts)]
        packed = PackedSequences(caches, counts)
        together = handle.model(torch.cat(pieces, 1), **tiny.cached(packed)).logits.split(counts, 1)
        for cache, own, piece, logits in zip(caches, expected, pieces, together, strict=True):
            close(logits, handle.model(piece, **tiny.cached(own)).logits)
            assert cache.seen == own.seen
    for row, (cache, own) in enumerate(zip(caches, expected, strict=True)):
        close(steps(handle, cache, [row], 4), steps(handle, own, [row], 4))


def test_packed_streams_may_follow_policies_of_their_own():
    with attach(tiny.build("llama"), LMInfinite(window=24, sinks=3)) as handle, torch.no_grad():
        policies = [None, FullAttention(), LMInfinite(window=20, top_k=2, top_k_layers=0)]
        caches = [alone(handle, [50], policy)[0] for policy in policies]
        expected = [cache.fork() for cache in caches]
        piece = ids_of(12, 5)
        together = handle.model(piece, **tiny.cached(PackedSequences(caches, [4, 1, 7]))).logits
        for logits, own, part in zip(
            together.split([4, 1, 7], 1), expected, piece.split([4, 1, 7], 1), strict=True
        ):
            close(logits, handle.model(part, **tiny.cached(own)).logits)


def test_packed_sequences_refuse_what_they_cannot_do():
    with attach(tiny.build("llama"), LMInfinite(window=24, sinks=3)) as handle, torch.no_grad():
        model, (one, two) = handle.model, alone(handle, [9, 30])
        with attach(tiny.build("llama", seed=1), LMInfinite(window=24)) as other:
            foreign = other.new_cache()
        several = handle.new_cache()
        model(tiny.random_ids(2, 5), **tiny.cached(several))
        for make, kind, words in [
            (lambda: PackedSequences([], []), InputError, "counts of new tokens"),
            (lambda: PackedSequences([one, two], [3]), InputError, "counts of new tokens"),
            (lambda: PackedSequences([one, two], [3, 0]), InputError, "counts of new tokens"),
            (lambda: PackedSequences([one, one], [3, 1]), InputError, "once"),
            (lambda: PackedSequences([one, foreign], [3, 1]), StateError, "different models"),
            (lambda: PackedSequences([one, several], [3, 1]), UnsupportedUseError, "several rows"),
        ]:
            with pytest.raises(kind, match=words):
                make()
        packed = PackedSequences([one, two], [3, 2])
        with pytest.raises(InputError, match="5 new tokens"):
            model(ids_of(4, 0), **tiny.cached(packed))
        with pytest.raises(UnsupportedUseError, match="attention mask"):
            model(ids_of(5, 0), attention_mask=torch.ones(1, 5, dtype=torch.long), **tiny.cached(packed))
        with pytest.raises(UnsupportedUseError, match="cannot follow a policy"):
            model.generate(ids_of(5, 0), max_new_tokens=1, **tiny.cached(packed))
        assert (one.seen, two.seen) == (9, 30)
        model(ids_of(5, 0), **tiny.cached(packed))
        assert (one.seen, two.seen) == (12, 32)
