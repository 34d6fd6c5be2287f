"""Keys looked at by a compiled kernel: the largest products of blocks, as plain operations find them."""

import pytest
import torch

from everlong.attention import block_maxima, compiled_keys, key_index
from everlong.attention.block_maxima import BlockMaxima
from everlong.attention.key_index import KeyIndex
from everlong.errors import StateError
from everlong.kernels import loading
from everlong.kernels.direct import Segments, look
from everlong.kernels.team import has_team
from everlong.kernels.tiles import in_tiles

pytestmark = pytest.mark.skipif(not (loading.wanted() and has_team()), reason="there are no kernels here")


@pytest.fixture(autouse=True)
def for_few(monkeypatch):
    monkeypatch.setattr(compiled_keys, "_LEAST", 0)


@pytest.fixture
def taken(monkeypatch):
    """One entry for each time that the kernel looks at keys."""
    seen = []

    def counted(*given, **rest):
        seen.append(1)
        look(*given, **rest)

    for module in (block_maxima, key_index):
        monkeypatch.setattr(module, "look", counted)
    return seen


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def largest(asked, keys, first, begin, stop, block):
    """Return the largest product of each block, by double precision and loops."""
    products = asked.double() @ keys.double().mT
    blocks = [range(at, min(at + block, stop)) for at in range(begin, stop, block)]
    found = torch.full((len(asked), asked.shape[1], len(blocks)), -torch.inf, dtype=torch.float64)
    for number, tokens in enumerate(blocks):
        here = [token - first for token in tokens if 0 <= token - first < keys.shape[1]]
        if here:
            found[..., number] = products[..., here].amax(-1)
    return found


def cut(keys, first, segment):
    """Return keys in segments that begin at multiples, heads apart from one another."""
    stops = [*range(first - first % segment + segment, first + keys.shape[1], segment), first + keys.shape[1]]
    begins = [first, *stops[:-1]]
    return [keys[:, a - first : b - first] for a, b in zip(begins, stops, strict=True)]


def tiles_of(pieces, first, segment):
    """Return pieces of codes that begin at a token, in tiles, heads apart from one another."""
    begins = [first, *range(first - first % segment + segment, first + segment * len(pieces), segment)]
    tiles = [in_tiles(piece, begin) for piece, begin in zip(pieces, begins, strict=False)]
    return [torch.stack((x, x), 1)[:, 1] for x in tiles]


@pytest.mark.parametrize(
    ("count", "first", "begin", "stop", "block"),
    [
        (1, 0, 0, 1, 1),
        (50, 3, 8, 53, 5),
        (700, 40, 0, 1000, 32),  # begins before, ends behind
        (900, 70, 101, 964, 8),
        (900, 70, 101, 964, 700),  # longer than what a thread looks at
        (900, 64, 64, 964, 1),
    ],
)
@pytest.mark.parametrize("kind", ["keys", "codes"])
@pytest.mark.parametrize(("heads", "asking", "d"), [(1, 1, 8), (3, 12, 64), (2, 3, 21)])
def test_maxima_are_those_of_plain_operations(
    heads, asking, d, kind, count, first, begin, stop, block, threads
):
    asked, keys = randn(heads, asking, d), randn(heads, count, d, seed=1)
    spread, rounding = None, 0.0
    pieces = cut(keys, first, 64)
    if kind == "codes":
        codes = torch.randint(-127, 128, keys.shape, generator=torch.Generator().manual_seed(2))
        spread = randn(len(pieces), heads, d, seed=3).abs() / 50, randn(len(pieces), heads, d, seed=4)
        pieces = cut(codes.to(torch.int8), first, 64)
        each = zip(pieces, *spread, strict=True)
        keys = torch.cat([center[:, None] + scale[:, None] * x for x, scale, center in each], 1)
        pieces = tiles_of(pieces, first, 64)
        steps = (asked[:, :, None] * spread[0].transpose(0, 1)[:, None]).abs().amax() / 32767
        rounding = float(steps) / 2 * 127 * d
    found = torch.full((heads, asking, -(-(stop - begin) // block)), -torch.inf)
    segments = Segments(pieces, first=first, stop=first + count, segment=64)
    look(asked, segments, spread, found, begin=begin, stop=stop, block=block)
    expected = largest(asked, keys, first, begin, stop, block)
    torch.testing.assert_close(found.double(), expected, atol=1e-4 + rounding, rtol=1e-5)
    before = found.clone()
    found += 1
    look(asked, segments, spread, found, begin=begin, stop=stop, block=block)
    assert torch.equal(found, before + 1), "maxima are raised only"


@pytest.mark.parametrize("d", [7, 64, 512])
def test_codes_and_what_asks_are_multiplied_as_whole_numbers(d, threads):
    draws = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (2, 100, d), generator=draws, dtype=torch.int8)
    asked = torch.randint(-32767, 32768, (2, 8, d), generator=draws).float()
    asked[..., 0] = 32767  # the largest of each, so that all of them are as they are
    codes[1, 40], asked[1, 3] = 127, 32767  # as large a sum as there is
    spread = torch.ones(2, 2, d), torch.zeros(2, 2, d)
    found = torch.full((2, 8, 100), -torch.inf)
    pieces = tiles_of(cut(codes, 0, 64), 0, 64)
    look(asked, Segments(pieces, first=0, stop=100, segment=64), spread, found, begin=0, stop=100, block=1)
    assert torch.equal(found, (asked.long() @ codes.long().mT).float())


@pytest.mark.parametrize("is_exact", [True, False])
def test_a_key_gives_the_same_number_wherever_blocks_and_segments_begin(is_exact, threads, taken):
    keys, asked, index = randn(1, 2, 2500, 64), randn(2, 3, 64, seed=1), KeyIndex(is_exact=is_exact)
    index.append(keys)
    whole = BlockMaxima(asked, 0, 2500, 1)
    index.look(0, whole)
    for begin, stop in ((1, 2500), (5, 2047), (1023, 1027), (2499, 2500)):
        part = BlockMaxima(asked, begin, stop, 1)
        index.look(0, part)
        assert torch.equal(part.found, whole.found[..., begin:stop])
    assert len(taken) == 7, "segments and what follows them, where any of either are wanted"


def test_what_it_does_not_take_is_pytorchs(taken, monkeypatch):
    keys, asked = randn(2, 90, 16), randn(2, 3, 16, seed=1)
    apart = randn(2, 16, 90).mT  # the numbers of a key lie apart
    for some, of, is_taken in (
        (keys.double(), asked.double(), False),
        (keys.bfloat16(), asked, False),
        (apart, asked, False),
        (keys, asked.mT.contiguous().mT, True),  # is laid together
        (torch.cat((keys, keys), 1)[:, :90], asked, True),
    ):
        taken.clear()
        best = BlockMaxima(of, 0, 90, 8)
        best.look(0, some)
        true = largest(of, some, 0, 0, 90, 8)
        torch.testing.assert_close(
            best.found.double(), true, atol=0.2 if some.dtype == torch.bfloat16 else 1e-4, rtol=0
        )
        assert bool(taken) == is_taken
    monkeypatch.setattr(compiled_keys, "_LEAST", 80 * asked.numel())
    for begin, stop in ((0, 90), (15, 90)):  # enough of them, and too few
        taken.clear()
        BlockMaxima(asked, begin, stop, 8).look(0, keys)
        assert bool(taken) == (begin == 0)


def test_what_lies_otherwise_is_refused():
    keys, asked, found = randn(2, 90, 16), randn(2, 3, 16), torch.zeros(2, 3, 12)
    rest, whole = {"begin": 0, "stop": 90, "block": 8}, {"first": 0, "stop": 90, "segment": 64}
    good = Segments(cut(keys, 0, 64), **whole)
    look(asked, good, None, found, **rest)
    spread = torch.ones(2, 2, 16), torch.ones(2, 2, 16)
    tiles = tiles_of(cut(keys.to(torch.int8), 0, 64), 0, 64)
    codes = Segments(tiles, **whole)
    look(asked, codes, spread, found, **rest)
    many = randn(2, 3, 514), Segments(tiles_of(cut(randn(2, 90, 514).to(torch.int8), 0, 64), 0, 64), **whole)
    for asking, segments, some, into in (
        (asked, Segments([keys[:, :50], keys[:, 50:]], **whole), None, found),  # cut elsewhere
        (asked, Segments(cut(keys[..., :8], 0, 64), **whole), None, found),
        (asked, Segments(cut(keys.to(torch.int8), 0, 64), **whole), spread, found),  # not in tiles
        (asked, Segments(tiles[:1], **whole), (spread[0][:1], spread[1][:1]), found),
        (asked, Segments(tiles, first=0, stop=90, segment=48), spread, found),
        (asked[..., :12].contiguous(), codes, (spread[0][..., :12].contiguous(),) * 2, found),
        (many[0], many[1], (torch.ones(2, 2, 514),) * 2, found),  # more than can be added up
        (asked, good, spread, found),
        (asked, codes, None, found),
        (asked, codes, (spread[0][:1], spread[1]), found),
        (asked, good, None, found[..., :11]),
        (asked, good, None, found.double()),
    ):
        with pytest.raises(StateError, match="look does not take"):
            look(asking, segments, some, into, **rest)


def test_a_kernel_that_is_wrong_is_left_with_a_warning(monkeypatch):
    monkeypatch.setattr(compiled_keys, "look", lambda *given, **rest: None)
    monkeypatch.setattr(compiled_keys, "_is_right", compiled_keys._is_right.__wrapped__)
    keys, asked = randn(2, 90, 16), randn(2, 3, 16, seed=1)
    best = BlockMaxima(asked, 0, 90, 8)
    with pytest.warns(UserWarning, match="look at keys wrongly"):
        best.look(0, keys)
    torch.testing.assert_close(best.found.double(), largest(asked, keys, 0, 0, 90, 8), atol=1e-4, rtol=0)


def test_it_is_held_against_plain_operations_under_autocast_too(taken, monkeypatch):
    monkeypatch.setattr(compiled_keys, "_is_right", compiled_keys._is_right.__wrapped__)
    keys, asked = randn(2, 90, 16), randn(2, 3, 16, seed=1)
    best = BlockMaxima(asked, 0, 90, 8)
    with torch.autocast("cpu", torch.bfloat16):
        best.look(0, keys)
    torch.testing.assert_close(best.found.double(), largest(asked, keys, 0, 0, 90, 8), atol=1e-4, rtol=0)
    assert taken


def test_it_follows_neither_the_default_dtype_nor_device(monkeypatch):
    monkeypatch.setattr(compiled_keys, "_is_right", compiled_keys._is_right.__wrapped__)
    keys, asked = randn(2, 90, 16), randn(2, 3, 16, seed=1)
    best = BlockMaxima(asked, 0, 90, 8)
    segments = Segments([keys], first=0, stop=90, segment=90)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert compiled_keys.pays(asked, segments, best.found)
            look(asked, segments, None, best.found, **best.blocks())
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(best.found.double(), largest(asked, keys, 0, 0, 90, 8), atol=1e-4, rtol=0)
