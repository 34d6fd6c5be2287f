"""The rows of a cache: padding, repeating, selecting, reordering, copying; in every grad mode."""

import copy

import pytest
import torch

import tests.tiny as tiny
from everlong.attention import DualChunk, FullAttention, LMInfinite, SelfExtend, StreamingLLM, attach
from everlong.errors import StateError

CASES = {
    "lm-infinite": ("llama", LMInfinite(window=24, sinks=3)),
    "low ceiling": ("llama", LMInfinite(window=24, sinks=3, ceiling=9)),
    "top_k": ("llama", LMInfinite(window=24, sinks=3, top_k=2, top_k_layers=0)),
    "streaming-llm": ("llama", StreamingLLM(window=24)),
    "full": ("llama", FullAttention()),
    "self-extend": ("llama", SelfExtend(neighbours=24, group_size=3)),
    "dual-chunk": ("llama", DualChunk(chunk=24, positions=30)),
    "local layers": ("gemma3_text", LMInfinite(window=24, sinks=3)),
}
LENGTHS = [60, 41, 23, 2]  # beyond the window, and below


@pytest.fixture(scope="module", params=CASES)
def handle(request):
    family, policy = CASES[request.param]
    with attach(tiny.build(family), policy) as attached:
        yield attached


@pytest.fixture
def model(handle):
    with torch.no_grad():
        yield handle.model


@pytest.fixture(scope="module")
def batch():
    return tiny.left_padded(LENGTHS)


def close(ours, expected):
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def feed(model, cache, ids, mask, edges):
    """Read the batch chunk by chunk; return the last chunk's logits."""
    for begin, stop in zip(edges, edges[1:], strict=False):
        logits = model(ids[:, begin:stop], attention_mask=mask[:, :stop], **tiny.cached(cache)).logits
    return logits


def continued(model, cache, rows, seed=7):
    """Read two chunks and two single tokens more, the same ones in every row."""
    ids = tiny.random_ids(1, 12, seed=seed).expand(rows, -1)
    edges = (0, 5, 10, 11, 12)
    pieces = [
        model(ids[:, begin:stop], **tiny.cached(cache)).logits
        for begin, stop in zip(edges, edges[1:], strict=False)
    ]
    return torch.cat(pieces, 1)


# --- padding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "edges",
    [(0, 60), (0, 7, 30, 31, 60), (0, 25, 50, 60), tuple(range(61))],
    ids=["one call", "chunks that end in the padding", "chunks longer than the window", "token by token"],
)
def test_padded_rows_equal_the_rows_alone(model, handle, batch, edges):
    if edges[-2] == 59 and type(handle.policy) is FullAttention:
        pytest.skip("covered by the chunks")
    ids, mask = batch
    cache = handle.new_cache()
    feed(model, cache, ids, mask, edges)
    together = continued(model, cache, len(LENGTHS))
    for row, length in enumerate(LENGTHS):
        alone = tiny.cache_of(model(ids[row : row + 1, -length:]))
        close(together[row : row + 1], continued(model, alone, 1))


def test_padding_can_be_left_out_once_it_is_known(model, handle, batch):
    ids, mask = batch
    longer = torch.cat((ids, tiny.random_ids(4, 9, seed=3)), 1)
    given, left_out = handle.new_cache(), handle.new_cache()
    for cache in (given, left_out):
        model(ids, attention_mask=mask, **tiny.cached(cache))
    whole = torch.cat((mask, mask.new_ones(4, 9)), 1)
    assert torch.equal(
        model(longer[:, 60:], attention_mask=whole, **tiny.cached(given)).logits,
        model(longer[:, 60:], **tiny.cached(left_out)).logits,
    )


# --- rows that move ---------------------------------------------------------------------------------------


def test_reordered_rows_go_on_as_what_they_were(model, handle, batch):
    """Also once some rows are there twice: everything a row owns moves with it, its padding too."""
    ids, mask = batch
    cache = handle.new_cache()
    feed(model, cache, ids, mask, (0, 60))
    kept = continued(model, cache.fork(), 4)
    order = torch.tensor([3, 0, 0, 2])
    cache.reorder_cache(order)
    close(continued(model, cache, 4), kept[order])


def test_selected_and_repeated_rows_go_on_as_what_they_were(model, handle, batch):
    ids, mask = batch
    cache = handle.new_cache()
    feed(model, cache, ids, mask, (0, 60))
    kept = continued(model, cache.fork(), 4)
    cache.batch_select_indices(torch.tensor([2, 1]))
    assert cache.batch_size == 2
    cache.batch_repeat_interleave(3)
    assert cache.batch_size == 6
    close(continued(model, cache, 6), kept[[2, 2, 2, 1, 1, 1]])


def test_rows_that_stay_as_they_are_are_not_touched(model, handle, batch):
    ids, mask = batch
    cache = handle.new_cache()
    feed(model, cache, ids, mask, (0, 30, ids.shape[1]))
    held = [(memory.keys, memory.ready) for memory in cache.memories.values()]
    cache.reorder_cache(torch.arange(len(ids)))
    cache.batch_select_indices(torch.ones(len(ids), dtype=torch.bool))
    for memory, (keys, ready) in zip(cache.memories.values(), held, strict=True):
        assert memory.keys is keys and memory.ready is ready
    cache.reorder_cache(torch.tensor([1, 0, 2, 3]))
    assert all(
        memory.keys is not keys for memory, (keys, _) in zip(cache.memories.values(), held, strict=True)
    )


def test_rows_selected_by_a_mask(model, handle, batch):
    ids, mask = batch
    cache = handle.new_cache()
    feed(model, cache, ids, mask, (0, 60))
    kept = continued(model, cache.fork(), 4)
    cache.batch_select_indices(torch.tensor([True, False, False, True]))
    close(continued(model, cache, 2), kept[[0, 3]])


def test_row_operations_on_an_empty_cache_do_nothing(handle):
    cache = handle.new_cache()
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.batch_size == -1 and not cache.is_initialized


def test_rows_moved_in_inference_mode_go_on_without_it(model, handle, batch):
    ids, mask = batch
    cache = handle.new_cache()
    feed(model, cache, ids, mask, (0, 60))
    kept = continued(model, cache.fork(), 4)
    with torch.inference_mode():
        cache.reorder_cache(torch.tensor([1, 0, 2, 3]))
        copied = cache.fork()
    close(continued(model, cache, 4), kept[[1, 0, 2, 3]])
    close(continued(model, copied, 4), kept[[1, 0, 2, 3]])


# --- copies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [copy.deepcopy, lambda cache: cache.fork()], ids=["deepcopy", "fork"])
def test_a_copy_and_its_original_go_on_independently(model, handle, batch, make):
    ids, mask = batch
    cache = handle.new_cache()
    feed(model, cache, ids, mask, (0, 60))
    other = make(cache)
    expected = continued(model, make(cache), 4, seed=7)
    continued(model, cache, 4, seed=8)
    assert torch.equal(continued(model, other, 4, seed=7), expected)


def test_a_copy_does_not_reach_the_model(model, handle, batch):
    """Caches are copied and sent around; one that refers to the model would take it along."""
    cache = tiny.cache_of(model(batch[0]))
    seen, stack = set(), [cache]
    while stack:
        thing = stack.pop()
        if id(thing) in seen or isinstance(thing, (str, int, float, type, torch.Tensor, type(None))):
            continue
        seen.add(id(thing))
        assert not isinstance(thing, torch.nn.Module)
        if isinstance(thing, dict):
            stack += [*thing.keys(), *thing.values()]
        elif isinstance(thing, (list, tuple, set)):
            stack += list(thing)
        else:
            stack += list(getattr(thing, "__dict__", {}).values())
    assert len(seen) > 5


@pytest.mark.parametrize("read", [0, 2, 20, 24, 60])
def test_a_saved_state_goes_on_bit_by_bit_and_is_not_the_live_cache(model, handle, batch, read):
    ids, mask = batch
    cache = handle.new_cache()
    if read:
        feed(model, cache, ids[:, -read:], mask[:, -read:], (0, read))
    tensors, meta = cache.state()
    copied = {name: tensor.clone() for name, tensor in tensors.items()}
    expected = continued(model, cache.fork(), 4)
    continued(model, cache, 4, seed=8)
    assert all(torch.equal(tensors[name], copied[name]) for name in copied), (
        "the state changed with the cache"
    )
    for _ in range(2):
        restored = handle.restore_cache(tensors, meta)
        assert (restored.seen, restored.kept) == (read, cache_kept(handle, read))
        assert torch.equal(continued(model, restored, 4), expected)


def cache_kept(handle, read):
    return read if handle.policy.span is None else min(read, handle.policy.span)


def test_a_state_with_a_part_missing_is_refused(model, handle, batch):
    cache = tiny.cache_of(model(batch[0]))
    tensors, meta = cache.state()
    for key in ("policy", "options", "seen", "offset", "pads", "rows", "kept_layers", "layers", "shapes"):
        with pytest.raises(StateError, match="not complete|other layers"):
            handle.restore_cache(tensors, {k: v for k, v in meta.items() if k != key})
    for name in tensors:
        for damaged in ({}, {name: tensors[name][..., :-1]}):
            with pytest.raises(StateError, match=name):
                handle.restore_cache({k: t for k, t in tensors.items() if k != name} | damaged, meta)


def test_reset_begins_again(model, handle, batch):
    ids, _ = batch
    cache = handle.new_cache()
    expected = model(ids[:2], **tiny.cached(cache)).logits
    cache.reset()
    assert cache.seen == 0 and not cache.is_initialized
    assert torch.equal(model(ids[:2], **tiny.cached(cache)).logits, expected)
    cache.reset()
    model(ids, **tiny.cached(cache))  # also with another number of rows


# --- accounts ---------------------------------------------------------------------------------------------


def test_accounts_add_up_to_what_was_read(model, handle, batch):
    ids, mask = batch
    cache = handle.new_cache()
    for begin, stop in ((0, 10), (10, 24), (24, 25), (25, 60)):
        model(ids[:, begin:stop], attention_mask=mask[:, :stop], **tiny.cached(cache))
        assert cache.seen == cache.get_seq_length() == stop
        assert cache.kept + cache.recallable + cache.forgotten == stop
        assert cache.kept == cache_kept(handle, stop)
        tensors = [
            value
            for memory in cache.memories.values()
            for value in (*vars(memory).values(), *memory.index.values())
            if isinstance(value, torch.Tensor)
        ]
        assert cache.bytes()["window"] == sum(tensor.nbytes for tensor in tensors)
    assert (cache.recallable > 0) == (getattr(handle.policy, "top_k", 0) > 0)
    assert (cache.bytes()["ram"] > 0) == (cache.recallable > 0)
    assert len(cache) == model.config.num_hidden_layers
