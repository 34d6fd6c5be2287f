"""What leaves the window is found again in the tier below: whole, or coded; on every shelf, in every copy."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import random
import signal
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

import tests.tiny as tiny
from everlong.attention import LMInfinite, Tier, attach, tiers
from everlong.attention.tiers import BLOCK, BlockStore, TierLostError
from everlong.errors import ConfigurationError, StateError
from tests.reference.attention import ReferenceSpec
from tests.reference.model import reference_logits

PRECISIONS = ("exact", "float16", "int8")
PLACES = ("ram", "disk")
SHAPE = (2, 3, 8)  # rows, heads, channels


def store_of(tier: Tier, layers: int = 1) -> BlockStore:
    store = BlockStore()
    most = tier.bytes_at_most()
    store.use(tier, tier.shelf(), None if most is None else most // layers)
    return store


def tokens(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values of so many tokens, of another size each."""
    generator = torch.Generator().manual_seed(seed)
    rows, heads, channels = SHAPE
    return (
        torch.randn(rows, heads, count, channels, generator=generator),
        torch.randn(rows, heads, count, channels + 4, generator=generator) * 3,
    )


def fill(store: BlockStore, keys: torch.Tensor, values: torch.Tensor, seed: int = 0) -> None:
    """Append in pieces of all sizes."""
    draws, at = random.Random(seed), 0
    while at < keys.shape[2]:
        stop = min(at + draws.choice((1, 2, 63, 64, 65, 200)), keys.shape[2])
        store.append(keys[:, :, at:stop], values[:, :, at:stop])
        at = stop


def most_off(found: torch.Tensor, true: torch.Tensor, precision: str, *, closed: int) -> None:
    """Check what was read against what was written, whole blocks up to `closed`; the rest is exact."""
    assert found.shape == true.shape and found.dtype == true.dtype
    assert torch.equal(found[:, :, closed:], true[:, :, closed:])
    if precision == "exact":
        assert torch.equal(found, true)
    elif precision == "float16":
        assert torch.equal(found[:, :, :closed], true[:, :, :closed].half().to(true.dtype))
    else:
        for begin in range(0, closed, BLOCK):
            block, was = (x[:, :, begin : begin + BLOCK] for x in (found, true))
            step = was.abs().amax(2, keepdim=True) / 127
            assert ((block - was).abs() <= step * 0.51).all()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_was_appended_is_read_in_any_range(place, precision):
    keys, values = tokens(5 * BLOCK + 17)
    store = store_of(Tier(place, precision))
    fill(store, keys, values)
    assert (len(store), store.first) == (keys.shape[2], 0)
    closed = len(store) // BLOCK * BLOCK
    for begin, stop in itertools.combinations(
        (0, 1, 63, 64, 65, 130, 5 * BLOCK, 5 * BLOCK + 3, len(store)), 2
    ):
        found = store.read(begin, stop)
        whole = store.read(0, len(store))
        assert all(torch.equal(f, w[:, :, begin:stop]) for f, w in zip(found, whole, strict=True))
    most_off(whole[0], keys, precision, closed=closed)
    most_off(whole[1], values, precision, closed=closed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_other_types_come_back_as_they_were(dtype, precision):
    keys, values = (x.to(dtype) for x in tokens(2 * BLOCK))
    store = store_of(Tier("disk", precision))
    fill(store, keys, values)
    found = store.read(0, 2 * BLOCK)
    assert [x.dtype for x in found] == [dtype] * 2
    for ours, true in zip(found, (keys, values), strict=True):
        assert torch.equal(ours, true) or precision != "exact"
        assert (ours - true).abs().max() <= (0.1 if precision == "int8" else 0.01)


@pytest.mark.parametrize("precision", ["float16", "int8"])
@pytest.mark.parametrize("large", [1e6, float("inf")])
def test_numbers_beyond_half_precision_are_kept_finite(precision, large):
    keys, values = tokens(BLOCK)
    keys[0, 0, 0, 0] = large
    store = store_of(Tier(precision=precision))
    store.append(keys, values)
    found = store.read(0, BLOCK)[0]
    assert found[0, 0, 0, 0] == pytest.approx(torch.finfo(torch.float16).max)
    assert torch.isfinite(found).all()


def test_nothing_but_zeros_is_coded_too():
    nothing = torch.zeros(1, 1, BLOCK, 4)
    store = store_of(Tier(precision="int8"))
    store.append(nothing, nothing)
    assert torch.equal(store.read(0, BLOCK)[0], nothing)


# --- limits and accounts ------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_bytes_are_those_of_the_blocks_and_the_open_one(place, precision):
    keys, values = tokens(3 * BLOCK + 5)
    store = store_of(Tier(place, precision))
    assert store.nbytes() == store.nbytes_at(0, (keys, values)) == {"ram": 0, "disk": 0}
    fill(store, keys, values)
    numbers = SHAPE[0] * SHAPE[1] * (2 * SHAPE[2] + 4)
    size = {"exact": 4 * BLOCK, "float16": 2 * BLOCK, "int8": BLOCK + 4}[precision] * numbers
    held = {"ram": 4 * BLOCK * numbers, "disk": 0}
    held[place] += 3 * size
    assert store.nbytes() == held
    held[place] += 7 * size
    held["ram"] += (9 - BLOCK) * 4 * numbers  # spare room aside
    assert store.nbytes_at(10 * BLOCK + 9, (keys, values)) == held


@pytest.mark.parametrize("place", PLACES)
def test_a_limit_is_obeyed_and_the_oldest_go(place):
    keys, values = tokens(12 * BLOCK + 3)
    size = 2 * BLOCK * SHAPE[0] * SHAPE[1] * (2 * SHAPE[2] + 4)
    store = store_of(Tier(place, limit=2 * (4 * size + 10)), layers=2)
    for at in range(0, 12 * BLOCK + 3, 50):
        store.append(keys[:, :, at : at + 50], values[:, :, at : at + 50])
        open_bytes = store_of(Tier()).nbytes()["ram"] + 4 * BLOCK * SHAPE[0] * SHAPE[1] * (2 * SHAPE[2] + 4)
        assert sum(store.nbytes().values()) - open_bytes <= 4 * size
        assert store.first == max(0, len(store) // BLOCK - 4) * BLOCK
    assert store.nbytes_at(len(store), (keys, values))[place] >= 4 * size
    found = store.read(store.first, len(store))[0]
    assert torch.equal(found[:, :, : 4 * BLOCK], keys[:, :, store.first : 12 * BLOCK].half().float())


@pytest.mark.parametrize(
    ("place", "available", "free", "expected"),
    [
        ("ram", 4000, 10, 1000),
        ("ram", None, 10, None),
        ("disk", 4000, 600, 300),
        ("disk", 4000, 60_000, 4000),
        ("disk", None, 600, 300),
    ],
)
def test_without_a_limit_of_ones_own_a_share_of_what_is_free_is_used(
    place, available, free, expected, monkeypatch
):
    monkeypatch.setattr(tiers, "available_bytes", lambda device: available)
    monkeypatch.setattr(tiers.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    assert Tier(place).bytes_at_most() == expected
    assert Tier(place, limit=None).bytes_at_most() is None
    assert Tier(place, limit=7).bytes_at_most() == 7


def test_a_limit_below_a_block_keeps_the_open_one_alone():
    keys, values = tokens(2 * BLOCK + 3)
    store = store_of(Tier(limit=10))
    fill(store, keys, values)
    assert (store.first, len(store)) == (2 * BLOCK, 2 * BLOCK + 3)
    assert torch.equal(store.read(2 * BLOCK, 2 * BLOCK + 3)[1], values[:, :, -3:])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"precision": "float8"}, "precision='float8'.*float16"),
        ({"limit": 0}, "limit must be 'auto', None or a number of bytes"),
        ({"limit": True}, "limit must be"),
        ({"limit": 1.5}, "limit must be"),
        ({"place": ""}, "place must be 'ram', 'disk' or a folder"),
        ({"place": None}, "place must be"),
    ],
)
def test_what_no_tier_can_be_is_refused(wrong, message):
    with pytest.raises(ConfigurationError, match=message):
        Tier(**wrong)


# --- copies and rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_copies_share_what_was_and_go_their_own_ways(place):
    keys, values = tokens(4 * BLOCK + 9)
    store = store_of(Tier(place, "exact"))
    store.append(keys[:, :, : 2 * BLOCK + 5], values[:, :, : 2 * BLOCK + 5])
    twin = copy.deepcopy(store)
    store.append(keys[:, :, 2 * BLOCK + 5 :], values[:, :, 2 * BLOCK + 5 :])
    others = tokens(BLOCK, seed=1)
    twin.append(*others)
    assert torch.equal(store.read(0, len(store))[0], keys)
    expected = torch.cat((keys[:, :, : 2 * BLOCK + 5], others[0]), 2)
    assert torch.equal(twin.read(0, len(twin))[0], expected)


def test_the_file_does_not_grow_by_what_nobody_has_any_more(tmp_path):
    keys, values = tokens(4 * BLOCK)
    store = store_of(Tier(tmp_path, "exact"))
    store.append(keys[:, :, :BLOCK], values[:, :, :BLOCK])
    shelf, lengths = store._shelf, []
    for _ in range(5):
        twin = copy.deepcopy(store)
        twin.append(keys[:, :, BLOCK:], values[:, :, BLOCK:])
        assert torch.equal(twin.read(0, len(twin))[0], keys)
        lengths.append(os.fstat(shelf._file.fileno()).st_size)
        del twin
        gc.collect()
    assert len(set(lengths)) == 1
    assert torch.equal(store.read(0, BLOCK)[1], values[:, :, :BLOCK])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rows", [[1], [1, 0, 1], [0, 1]])
def test_rows_are_picked_and_repeated(place, precision, rows):
    keys, values = tokens(2 * BLOCK + 5)
    store = store_of(Tier(place, precision))
    fill(store, keys, values)
    before = store.read(0, len(store))
    twin = copy.deepcopy(store)
    store.pick_rows(torch.tensor(rows))
    for ours, was in zip(store.read(0, len(store)), before, strict=True):
        assert torch.equal(ours, was[rows])
    store.append(keys[rows], values[rows])
    assert torch.equal(store.read(0, 2 * BLOCK)[0], before[0][rows, :, : 2 * BLOCK])
    assert torch.equal(twin.read(0, len(twin))[0], before[0])


# --- saved and restored -----------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", PRECISIONS)
@pytest.mark.parametrize("restored", PRECISIONS)
@pytest.mark.parametrize("count", [0, 5, BLOCK, 3 * BLOCK + 5])
def test_a_saved_tier_goes_on_bit_by_bit(saved, restored, count):
    keys, values = tokens(count + 70)
    store = store_of(Tier("disk", saved))
    fill(store, keys[:, :, :count], values[:, :, :count])
    state = store.state()
    again = store_of(Tier("ram", restored))
    again.load(*copy.deepcopy(state))
    assert (len(again), again.first) == (len(store), 0)
    if saved == restored:
        for one in (store, again):
            one.append(keys[:, :, count:], values[:, :, count:])
        pairs = zip(store.read(0, len(store)), again.read(0, len(again)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    elif count:
        (was, _), (found, _) = store.read(0, count), again.read(0, count)
        assert (was - found).abs().max() < 0.1


def test_what_was_given_up_stays_so_when_restored():
    keys, values = tokens(6 * BLOCK + 1)
    size = 2 * BLOCK * SHAPE[0] * SHAPE[1] * (2 * SHAPE[2] + 4)
    store = store_of(Tier(limit=4 * size))
    fill(store, keys, values)
    again, smaller = store_of(Tier()), store_of(Tier(limit=2 * size))
    for one in (again, smaller):
        one.load(*store.state())
        assert len(one) == len(store)
    assert (store.first, again.first, smaller.first) == (2 * BLOCK, 2 * BLOCK, 4 * BLOCK)
    assert torch.equal(smaller.read(4 * BLOCK, 6 * BLOCK)[0], store.read(4 * BLOCK, 6 * BLOCK)[0])


def test_a_state_that_is_not_whole_is_refused():
    store = store_of(Tier())
    fill(store, *tokens(2 * BLOCK + 1))
    tensors, numbers = store.state()
    with pytest.raises(StateError, match="precision that is not known: 'float8'"):
        store_of(Tier()).load(tensors, {**numbers, "precision": "float8"})
    short = {name: x[:1] if "blocks" in name else x for name, x in tensors.items()}
    with pytest.raises(StateError, match="blocks of its tier are missing"):
        store_of(Tier()).load(short, numbers)


# --- what can go wrong with files --------------------------------------------------------------------------


def test_a_folder_that_is_not_there_or_not_a_folder_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for folder in (tmp_path / "missing", file):
        with pytest.raises(ConfigurationError, match=f"{folder.name}.*name a folder that is there"):
            Tier(folder).shelf()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user who can be refused")
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigurationError, match="can be written to"):
        Tier(tmp_path).shelf()


KILLED = """
import os, signal, sys, torch
from everlong.attention.tiers import BlockStore, Tier
store, tier = BlockStore(), Tier(sys.argv[1])
store.use(tier, tier.shelf())
store.append(torch.ones(1, 1, 1000, 64), torch.ones(1, 1, 1000, 64))
print(store.nbytes()["disk"], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name != "posix", reason="a file that is in use has its name on other systems")
def test_a_killed_process_leaves_nothing_behind(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL and int(done.stdout) > 0
    assert list(tmp_path.iterdir()) == []


class Failing:
    """A file that takes so many bytes, and can be made to give none."""

    def __init__(self, file, room):
        self.file, self.room, self.is_gone = file, room, False

    def seek(self, at):
        self.at = at
        self.file.seek(at)

    def write(self, data):
        if self.at + len(data) > self.room:
            raise OSError(28, "No space left on device")
        return self.file.write(data)

    def readinto(self, buffer):
        if self.is_gone:
            raise OSError(5, "Input/output error")
        return self.file.readinto(buffer)


def test_on_a_full_disk_the_tier_goes_on_in_ram_and_loses_nothing(tmp_path):
    keys, values = tokens(6 * BLOCK + 2)
    store = store_of(Tier(tmp_path, "exact"))
    size = 4 * BLOCK * SHAPE[0] * SHAPE[1] * (2 * SHAPE[2] + 4)
    store._shelf._file = Failing(store._shelf._file, 3 * size + 7)
    with pytest.warns(
        UserWarning, match="nothing more can be written.*No space left.*goes on in RAM"
    ) as said:
        fill(store, keys, values)
        twin = copy.deepcopy(store)
        fill(twin, *tokens(3 * BLOCK, seed=1))
        twin.pick_rows(torch.tensor([1, 0]))
    assert len(said) == 1
    assert store.first == 0 and torch.equal(store.read(0, len(store))[0], keys)
    assert store.nbytes() == {"ram": size + 3 * size, "disk": 3 * size}
    assert torch.equal(twin.read(0, 6 * BLOCK)[1], values[[1, 0], :, : 6 * BLOCK])


def test_a_system_that_reads_and_writes_less_than_asked_is_asked_again(tmp_path):
    class Slow(Failing):
        def write(self, data):
            return self.file.write(data[:1000])

        def readinto(self, buffer):
            return self.file.readinto(buffer[:700])

    keys, values = tokens(3 * BLOCK)
    store = store_of(Tier(tmp_path, "exact"))
    store._shelf._file = Slow(store._shelf._file, 0)
    fill(store, keys, values)
    assert all(torch.equal(a, b) for a, b in zip(store.read(0, len(store)), (keys, values), strict=True))


def test_what_is_not_in_the_tier_is_not_read():
    store = store_of(Tier(limit=1))
    with pytest.raises(StateError, match=r"tokens \[0, 1\) are not in the tier"):
        store.read(0, 1)
    fill(store, *tokens(BLOCK + 3))
    for begin, stop in ((0, 3), (BLOCK, BLOCK + 4), (BLOCK + 2, BLOCK + 2)):
        with pytest.raises(StateError, match=f"it holds .{BLOCK}, {BLOCK + 3}"):
            store.read(begin, stop)


def test_picking_rows_obeys_the_limit():
    keys, values = tokens(6 * BLOCK)
    size = 2 * BLOCK * SHAPE[0] * SHAPE[1] * (2 * SHAPE[2] + 4)
    store = store_of(Tier(limit=6 * size))
    fill(store, keys, values)
    store.pick_rows(torch.tensor([0, 1, 0, 1]))  # each block takes twice as much
    assert store.first == 3 * BLOCK
    assert torch.equal(store.read(3 * BLOCK, 6 * BLOCK)[0][:2], keys[:, :, 3 * BLOCK :].half().float())


def test_a_file_that_cannot_be_read_is_lost_and_said_to_be(tmp_path):
    keys, values = tokens(2 * BLOCK + 2)
    store = store_of(Tier(tmp_path))
    fill(store, keys, values)
    store._shelf._file = Failing(store._shelf._file, 1 << 40)
    store._shelf._file.is_gone = True
    with (
        pytest.warns(UserWarning, match="Input/output error.*128 tokens.*forgotten"),
        pytest.raises(TierLostError),
    ):
        store.read(0, 3)
    assert store.first == 2 * BLOCK
    assert torch.equal(store.read(2 * BLOCK, 2 * BLOCK + 2)[0], keys[:, :, -2:])


# --- a model above it ---------------------------------------------------------------------------------

W, G, LENGTH = 10, 3, 48
POLICY = LMInfinite(window=W, sinks=G, top_k=3, top_k_layers=1)


@pytest.fixture(scope="module")
def model():
    return tiny.build("llama")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, tiny.VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def small_blocks(request, monkeypatch):
    """Blocks of four tokens, where a model reads: more leave its window than one block holds."""
    if "model" in request.fixturenames:
        monkeypatch.setattr(tiers, "BLOCK", 4)


@torch.no_grad()
def logits(model, handle, cache, ids, edges):
    pieces = [
        model(ids[:, begin:stop], **tiny.cached(cache)).logits for begin, stop in itertools.pairwise(edges)
    ]
    return torch.cat(pieces, 1)


EDGES = (0, 17, 18, 19, 33, LENGTH)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("precision", "off"), [("exact", 1e-4), ("float16", 1e-2), ("int8", 0.3)])
def test_logits_are_those_of_the_reference(model, ids, place, precision, off):
    spec = ReferenceSpec("lm-infinite", G, W, W - 1, top_k=3, top_k_layers=1)
    expected = reference_logits(model, ids, spec)
    with attach(model, POLICY, tier=Tier(place, precision)) as handle:
        cache = handle.new_cache()
        found = logits(model, handle, cache, ids, EDGES)
        assert cache.bytes()[place] > 0 and cache.recallable == LENGTH - W and cache.forgotten == 0
    apart = (found - expected).abs().max()
    assert apart <= off * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("place", PLACES)
def test_a_stream_that_was_forked_and_saved_goes_on_from_its_tier(model, ids, place):
    with attach(model, POLICY, tier=Tier(place)) as handle:
        whole = logits(model, handle, handle.new_cache(), ids, EDGES)
        cache = handle.new_cache()
        logits(model, handle, cache, ids, EDGES[:4])
        twin, restored = cache.fork(), handle.restore_cache(*cache.state())
        logits(model, handle, cache, ids.flip(1), (0, 9))
        for one in (twin, restored):
            found = logits(model, handle, one, ids[:, EDGES[3] :], (0, 33 - 19, LENGTH - 19))
            torch.testing.assert_close(found, whole[:, 19:], atol=1e-5, rtol=1e-5)


def test_what_a_limit_gives_up_is_forgotten_and_counted(model, ids):
    with attach(model, POLICY, tier=Tier(limit=1)) as handle:
        cache = handle.new_cache()
        logits(model, handle, cache, ids, EDGES)
        left = (LENGTH - W) % 4
        assert (cache.kept, cache.recallable, cache.forgotten) == (W, left, LENGTH - W - left)
        restored = handle.restore_cache(*cache.state())
        assert (restored.recallable, restored.forgotten) == (cache.recallable, cache.forgotten)


def test_a_stream_obeys_what_was_free_when_it_began(model, ids, monkeypatch):
    monkeypatch.setattr(tiers, "available_bytes", lambda device: 4)
    with attach(model, POLICY) as handle:
        small = handle.new_cache()
        monkeypatch.setattr(tiers, "available_bytes", lambda device: 10**9)
        large = handle.new_cache()
        for cache in (small, large):
            logits(model, handle, cache, ids, EDGES)
        assert small.forgotten > large.forgotten == 0


def test_a_stream_survives_a_tier_that_fails(model, ids, tmp_path):
    with attach(model, POLICY, tier=Tier(tmp_path)) as handle:
        cache = handle.new_cache()
        logits(model, handle, cache, ids, (0, 30))
        shelf = next(memory.tier._shelf for memory in cache.memories.values() if memory.tier is not None)
        shelf._file = Failing(shelf._file, 0)
        shelf._file.is_gone = True
        with pytest.warns(UserWarning, match="forgotten"):
            found = logits(model, handle, cache, ids[:, 30:], (0, 9, LENGTH - 30))
        assert torch.isfinite(found).all()
        assert cache.seen == LENGTH and cache.forgotten > 0
        assert cache.kept + cache.recallable + cache.forgotten == LENGTH


def test_beams_take_the_tier_along(model, ids):
    with attach(model, POLICY, tier=Tier("disk", "exact")), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = {"max_new_tokens": 12, "num_beams": 4, "do_sample": False}
        found = model.generate(ids[:, :30], **wanted)
        assert torch.equal(found, model.generate(ids[:, :30], **wanted, use_cache=False))


def test_a_batch_whose_rows_change_goes_on_from_its_tier(model, ids):
    with attach(model, POLICY, tier=Tier("disk", "exact")) as handle:
        cache = handle.new_cache()
        logits(model, handle, cache, ids, (0, 30))
        cache.batch_select_indices(torch.tensor([1, 0, 1]))
        found = logits(model, handle, cache, ids[[1, 0, 1], 30:], (0, 9, LENGTH - 30))
        whole = logits(model, handle, handle.new_cache(), ids, (0, 30, 39, LENGTH))
    torch.testing.assert_close(found, whole[[1, 0, 1], 30:], atol=1e-5, rtol=1e-5)


def test_a_place_alone_is_a_tier_and_what_is_none_is_refused(model, tmp_path):
    for place in ("disk", tmp_path):
        with attach(model, POLICY, tier=place) as handle:
            assert handle.tier == Tier(place)
    with pytest.raises(ConfigurationError, match="place must be"):
        attach(model, POLICY, tier=3)
    assert not hasattr(model.model, "_everlong_attachment")


def test_a_state_of_an_earlier_form_is_refused_as_such(model, ids):
    with attach(model, POLICY) as handle:
        cache = handle.new_cache()
        logits(model, handle, cache, ids, (0, 30))
        tensors, meta = cache.state()
        for numbers in meta["layers"].values():
            numbers.pop("tier", None)
        with pytest.raises(StateError, match="saved by an earlier version"):
            handle.restore_cache(tensors, meta)
