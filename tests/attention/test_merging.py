"""Chunks that merge between layers give what the definition gives, layer by layer."""

from __future__ import annotations

import threading
from itertools import accumulate, pairwise

import pytest
import torch

from everlong.attention import FullAttention, attach
from everlong.attention.merge_tree import Chunk, Tree, averages, even_cuts, find_borders, shares
from everlong.attention.merging import Apart, Merging, require_merging
from everlong.errors import InputError, UnsupportedModelError, UnsupportedUseError
from tests import tiny
from tests.reference.homer import Homer

ANSWER = [5, 9, 17, 33, 2, 61, 44, 8, 70]
LAYERS = 6
_LOCAL = {"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 8}
DEEP = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mixtral": {},
    "qwen2": {},
    "qwen3": {},
    "olmo2": {},
    "gemma2": _LOCAL,
    "gemma3_text": _LOCAL,
    "gpt_oss": _LOCAL,
    "ministral3": {},
}


def deep(family, **config):
    """A model of six layers, in float64, so that what is dropped hangs on no rounding."""
    model = tiny.build(family, **({"num_hidden_layers": LAYERS} | DEEP[family] | config)).double()
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):  # others take no float64
        model.set_experts_implementation("eager")
    return model


def made(tree):
    """Ids of what all chunks begin with, of the chunks, and of what they end with."""
    ids = tiny.random_ids(1, tree.around + sum(tree.lengths))[0].tolist()
    ends = [tree.prefix + end for end in accumulate(tree.lengths, initial=0)]
    return ids[: tree.prefix], [ids[a:b] for a, b in pairwise(ends)], ids[ends[-1] :]


def forward(handle, cache, ids):
    call = {"use_cache": True, "logits_to_keep": 1, **tiny.cached(cache)}
    return handle.model(torch.tensor([ids]), **call).logits[0]


def read(handle, tree, bias=()):
    """Read random chunks; return the logits behind the last one, and the cache that goes on from there."""
    prefix, chunks, suffix = made(tree)
    merging = Merging(handle.decoder, handle.layers, handle.owner, tree, bias)
    held = []
    for chunk in chunks:
        ids = [*prefix, *chunk, *suffix]
        logits = merging.read(lambda ids=ids: forward(handle, merging, ids))
        held.append(merging.bytes()["window"])
    return logits, merging.joined(), held


@torch.no_grad()
def logits_of(model, ids):
    return model(ids).logits


def ours(model, tree, bias=(), edges=(0, 9)):
    with attach(model, FullAttention()) as handle:
        first, cache, _ = read(handle, tree, bias)
        pieces = [
            model(torch.tensor([ANSWER[a:b]]), **tiny.cached(cache), use_cache=True).logits[0]
            for a, b in pairwise(edges)
        ]
    return torch.cat((first, *pieces)), cache


TREES = {
    "one chunk": Tree(2, 3, (20,), 25, ()),
    "one merge": Tree(2, 3, (13, 14), 16, (2,)),
    "two": Tree(3, 4, (9, 9, 9, 8), 11, (2, 4)),
    "two, late": Tree(3, 4, (9, 9, 9, 8), 11, (4, 5)),
    "three": Tree(1, 2, (7, 6, 7, 6, 7, 7, 6, 7), 7, (1, 3, 4)),
    "nothing before": Tree(0, 3, (9, 9, 9, 8), 11, (2, 4)),
    "one token behind": Tree(2, 1, (9, 9, 9, 8), 9, (2, 4)),
    "chunks of any length": Tree(2, 3, (9, 2, 3, 4), 9, (1, 4)),
    "nothing dropped": Tree(2, 3, (6, 5), 11, (3,)),
    "with their neighbours": Tree(2, 3, (9, 9, 9, 8), 11, (2, 4), neighbours=2),
    "two tokens left": Tree(2, 3, (2, 2, 1, 2), 2, (1, 4)),
}


@pytest.mark.parametrize("name", TREES)
@torch.no_grad()
def test_whatever_the_chunks_it_is_what_the_definition_gives(name):
    model, tree = deep("llama"), TREES[name]
    prefix, chunks, suffix = made(tree)
    expected = Homer(model, prefix, chunks, suffix, tree.room, tree.borders, neighbours=tree.neighbours)
    expected = expected.logits(ANSWER)
    for edges in ((0, 9), (0, 1, 2, 5, 9)):
        logits, cache = ours(model, tree, edges=edges)
        assert torch.allclose(logits, expected, atol=1e-4)
    root = tree.kept[-1] if tree.levels else tree.lengths
    assert cache.seen == cache.kept == tree.around + sum(root) + len(ANSWER)
    assert sum(root) <= tree.room


@pytest.mark.parametrize("family", DEEP)
@torch.no_grad()
def test_in_every_kind_of_family(family):
    model, tree = deep(family), TREES["two"]
    prefix, chunks, suffix = made(tree)
    expected = Homer(model, prefix, chunks, suffix, tree.room, tree.borders).logits(ANSWER)
    logits, _ = ours(model, tree)
    assert torch.allclose(logits, expected, atol=1e-4)


@torch.no_grad()
def test_layers_that_look_at_positions_are_told_the_new_ones():
    model, tree = deep("ministral3"), Tree(3, 4, (60, 60, 60, 58), 80, (2, 4))  # it scales from 64 on
    prefix, chunks, suffix = made(tree)
    expected = Homer(model, prefix, chunks, suffix, tree.room, tree.borders).logits(ANSWER)
    logits, _ = ours(model, tree)
    assert torch.allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("neighbours", [0, 1])
@pytest.mark.parametrize("calibrated", [(0,), (1, 3), (0, 1, 2, 3)], ids=str)
@torch.no_grad()
def test_the_bias_is_what_chunks_receive_that_go_up_alone(calibrated, neighbours):
    model, tree = deep("llama"), Tree(2, 3, (9, 9, 9, 8), 11, (2, 4), neighbours)
    prefix, chunks, suffix = made(tree)
    with attach(model, FullAttention()) as handle:
        apart = Apart(handle.decoder, handle.layers, handle.owner, tree)
        for number in calibrated:
            ids = [*prefix, *chunks[number], *suffix]
            apart.read_one(number, lambda ids=ids: forward(handle, apart, ids))
    bias = [averages(noted, 4) for noted in apart.noted]
    reference = Homer(model, prefix, chunks, suffix, tree.room, tree.borders, calibrated, 4, neighbours)
    for level in range(2):
        assert torch.allclose(bias[level], torch.tensor(reference.biases[level]), atol=1e-6)
    logits, _ = ours(model, tree, bias)
    assert torch.allclose(logits, reference.logits(ANSWER), atol=1e-4)
    without, _ = ours(model, tree)
    assert not torch.allclose(logits, without, atol=1e-2), "other tokens would stay without it"


# --- what is promised -------------------------------------------------------------------------------


@torch.no_grad()
def test_a_mistake_of_one_position_or_one_token_would_be_noticed():
    model, tree = deep("llama"), TREES["two"]
    prefix, chunks, suffix = made(tree)
    expected = Homer(model, prefix, chunks, suffix, tree.room, tree.borders).logits(ANSWER)
    with attach(model, FullAttention()) as handle:
        _, cache, _ = read(handle, tree)
        for memory in cache.memories.values():
            memory.origin -= 1
        moved = model(torch.tensor([ANSWER]), **tiny.cached(cache), use_cache=True).logits[0]
    assert not torch.allclose(moved, expected[1:], atol=1e-2)
    other, _ = ours(model, Tree(3, 4, (9, 9, 9, 8), 10, (2, 4)))
    assert not torch.allclose(other, expected, atol=1e-2)
    other, _ = ours(model, Tree(3, 4, (9, 9, 9, 8), 11, (2, 5)))
    assert not torch.allclose(other, expected, atol=1e-2)


@torch.no_grad()
def test_what_waits_grows_with_the_levels_and_not_with_the_text():
    model = tiny.build("llama", num_hidden_layers=LAYERS)
    most, a_token = {}, 4 * (2 * 2 * 8 * LAYERS + 32)  # bytes: keys and values of all layers, a hidden state
    with attach(model, FullAttention()) as handle:
        for levels in (1, 3, 5):
            tree = Tree(2, 3, (12,) * 2**levels, 12, tuple(range(1, levels + 1)))
            _, cache, held = read(handle, tree)
            most[levels] = max(held)
            assert most[levels] <= (levels * (6 + 5) + 17) * a_token
            assert cache.seen == 17
    assert most[5] < 3 * most[1], "16 times the text"


@torch.no_grad()
def test_after_it_the_model_is_what_it_was_and_other_threads_never_notice():
    model, tree = tiny.build("llama", num_hidden_layers=LAYERS), TREES["two"]
    ids = torch.tensor([made(tree)[0] * 5])
    expected = model(ids).logits
    found, threads = [], []
    with attach(model, FullAttention()) as handle:
        plain = logits_of(model, ids)

        def meanwhile(module, args, kwargs):
            if not threads:
                threads.append(threading.Thread(target=lambda: found.append(logits_of(model, ids))))
                threads[0].start()
                threads[0].join()

        hook = model.model.layers[3].self_attn.register_forward_pre_hook(meanwhile, with_kwargs=True)
        busy, _, _ = read(handle, tree)
        hook.remove()
        quiet, _, _ = read(handle, tree)
        assert torch.equal(busy, quiet) and torch.equal(found[0], plain)
        assert not any(layer._forward_pre_hooks for layer in model.model.layers)
    assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_saved_restored_and_copied_it_goes_on():
    model, tree = tiny.build("gemma3_text", **{"num_hidden_layers": LAYERS} | _LOCAL), TREES["two"]
    with attach(model, FullAttention()) as handle:
        _, cache, _ = read(handle, tree)
        copies = [cache.fork(), handle.restore_cache(*cache.state()), cache]
        one, two, three = (
            model(torch.tensor([ANSWER]), **tiny.cached(c), use_cache=True).logits for c in copies
        )
    assert torch.equal(one, three) and torch.allclose(two, three, atol=1e-5)


# --- the tree ---------------------------------------------------------------------------------------


def test_neighbours_share_a_room():
    assert shares(10, 10, 11) == (6, 5)
    assert shares(2, 10, 11) == (2, 9)
    assert shares(10, 2, 11) == (9, 2)
    assert shares(3, 4, 11) == (3, 4)
    for left in range(1, 9):
        for right in range(1, 9):
            kept = shares(left, right, 8)
            assert sum(kept) == min(8, left + right) and kept[0] <= left and kept[1] <= right


def test_cuts_are_even():
    assert even_cuts(10, 4) == (2, 3, 2, 3)
    for total in range(1, 40):
        cut = even_cuts(total, 8)
        assert sum(cut) == total and max(cut) - min(cut) <= 1


def test_borders_are_where_the_authors_have_them():
    every = range(32)
    assert find_borders(every, 32, 12, 0) == ()
    assert find_borders(every, 32, 12, 1) == (22,)
    assert find_borders(every, 32, 12, 2) == (20, 26)
    assert find_borders(every, 32, 12, 3) == (17, 22, 27)
    assert find_borders(every, 32, 12, 19) == tuple(range(13, 32))
    assert find_borders(every, 32, 12, 20) is None
    assert find_borders((5, 11, 17), 18, 5, 2) == (6, 12)
    assert find_borders((5, 11, 17), 18, 6, 1) == (12,)
    assert find_borders((5, 11, 17), 18, 6, 2) is None


def test_of_tokens_attended_to_alike_the_first_stay():
    tree = Tree(1, 1, (4, 4), 4, (1,))
    chunk = Chunk(4, scores=torch.tensor([9.0, 1, 3, 1, 1, 9]), keys={0: torch.arange(6.0).view(1, 1, 6, 1)})
    chunk.values = chunk.keys
    assert chunk.reduced(2, tree).keys[0].flatten().tolist() == [0, 1, 2, 5]
    assert chunk.reduced(4, tree) is chunk


# --- what is refused --------------------------------------------------------------------------------


def test_models_in_which_chunks_cannot_merge_are_refused():
    with (
        attach(tiny.build("gemma4_text"), FullAttention()) as handle,
        pytest.raises(UnsupportedModelError, match="use the keys of earlier ones.*InfiniRetri"),
    ):
        require_merging(handle.layers)
    scaled = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}
    with (
        attach(tiny.build("llama", **scaled), FullAttention()) as handle,
        pytest.raises(UnsupportedUseError, match="rotation depends on the length"),
    ):
        require_merging(handle.layers)


@torch.no_grad()
def test_layers_that_are_given_something_of_each_token_are_refused():
    model, tree = tiny.build("llama", num_hidden_layers=LAYERS), TREES["two"]

    def give(module, args, kwargs):
        return args, kwargs | {"per_token": torch.zeros(1, args[0].shape[1], 4)}

    model.model.layers[0].register_forward_pre_hook(give, with_kwargs=True)
    with (
        attach(model, FullAttention()) as handle,
        pytest.raises(UnsupportedModelError, match=r"hands its layers per_token of shape \(1, 16, 4\)"),
    ):
        read(handle, tree)
    assert (
        len(model.model.layers[0]._forward_pre_hooks) == 1
        and len(model.model.layers[1]._forward_pre_hooks) == 0
    )


@torch.no_grad()
def test_chunks_that_are_none_are_refused():
    model, tree = tiny.build("llama", num_hidden_layers=LAYERS), TREES["two"]
    with attach(model, FullAttention()) as handle:
        merging = Merging(handle.decoder, handle.layers, handle.owner, tree)
        with pytest.raises(InputError, match="chunk 0 has 16 tokens in one row; the input has 1 rows of 5"):
            forward(handle, merging, [5] * 5)
        with pytest.raises(UnsupportedUseError, match="neither an attention mask"):
            model(torch.ones(1, 16).long(), attention_mask=torch.ones(1, 16), **tiny.cached(merging))
