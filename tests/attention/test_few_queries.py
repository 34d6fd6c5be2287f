"""A few queries attend to many keys by two products: what they give, and when they are taken."""

import pytest
import torch

import tests.tiny as tiny
from everlong.attention import LMInfinite, attach, few_queries, parts
from everlong.attention.few_queries import attend_few, pays
from everlong.attention.parts import attend_all

SCALING = 0.3
HAS_MKL = torch.backends.mkl.is_available()
HEADS = {"grouped heads": (6, 3), "one key head": (4, 1), "full heads": (4, 4)}


@pytest.fixture
def threads():
    """Let a test choose how many threads there are."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=[True, False], ids=["keys times queries", "queries times keys"])
def keys_first(request, monkeypatch):
    """Let the products be those of one or the other processor."""
    monkeypatch.setattr(few_queries, "_has_avx512", lambda: request.param)
    return request.param


def tensors(batch=2, heads=(6, 3), n=1, m=512, size=8, room=0):
    """Queries, keys and values, in memory for some keys more."""
    torch.manual_seed(0)
    queries = torch.randn(batch, heads[0], n, size)
    keys, values = (torch.randn(batch, heads[1], m + room, size)[:, :, :m] for _ in range(2))
    return queries, keys, values


def one_softmax(queries, keys, values):
    """Write it down in float64."""
    groups = queries.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(groups, 1) for x in (keys, values))
    return (queries.double() @ keys.transpose(-1, -2) * SCALING).softmax(-1) @ values


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("m", "room"), [(1024, 0), (1023, 0), (1024, 5), (3, 0)], ids=["cut", "odd", "a part", "few keys"]
)
def test_it_is_one_softmax_however_keys_are_cut(m, room, n, count, heads, threads, keys_first):
    threads(count)
    for batch in (1, 2):
        given = tensors(batch, heads, n, m, room=room)
        expected = one_softmax(*given)
        assert attend_few(*given, SCALING).shape == expected.shape
        torch.testing.assert_close(attend_few(*given, SCALING).double(), expected, atol=1e-5, rtol=1e-5)


def test_the_products_are_those_that_are_fast_here(keys_first, monkeypatch):
    monkeypatch.setattr(few_queries, "_keys_by_queries", lambda asking, *_: torch.zeros_like(asking))
    monkeypatch.setattr(few_queries, "_queries_by_keys", lambda asking, *_: torch.ones_like(asking))
    for size, expected in ((64, 0 if keys_first else 1), (65, 0)):
        assert (attend_few(*tensors(size=size), SCALING) == expected).all()


def test_keys_are_cut_where_threads_would_have_unequal_shares_and_only_what_lies_whole(threads):
    pieces = few_queries._pieces
    expected = {(1, 3, 2): 2, (1, 3, 3): 1, (1, 1, 4): 4, (2, 2, 4): 1, (2, 3, 4): 2}
    for (batch, kv_heads, count), cut in expected.items():
        threads(count)
        _, keys, values = tensors(batch, (kv_heads, kv_heads), m=2048)
        assert pieces(keys, values) == cut
        assert pieces(keys[:, :, :-4], values[:, :, :-4]) == 1, "others lie between"
    threads(2)
    assert pieces(*tensors(1, (3, 3), m=510)[1:]) == 1, "too short to be cut"
    assert pieces(*tensors(1, (3, 3), m=2047)[1:]) == 1
    threads(16)
    assert pieces(*tensors(1, (3, 3), m=2048)[1:]) == 8, "as many as are long enough"


@pytest.mark.parametrize(
    ("waiting", "turns", "count", "least"),
    [
        *(("", None, 1, 2**19), ("", None, 2, 2**19), ("passive", None, 2, 2**22)),
        *(("PASSIVE", None, 1, 2**19), ("PASSIVE", "5000", 2, 2**19), ("", "0", 2, 2**22)),
    ],
)
def test_it_pays_from_some_work_on_and_later_where_threads_sleep(
    waiting, turns, count, least, threads, monkeypatch
):
    monkeypatch.setenv("OMP_WAIT_POLICY", waiting)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if turns is not None:
        monkeypatch.setenv("GOMP_SPINCOUNT", turns)
    few_queries._sleeps.cache_clear()
    try:
        threads(count)
        enough = least // (2 * 4 * 8)
        for more, expected in ((0, True), (-1, False)):
            assert pays(*tensors(2, (4, 2), m=enough + more)) == (
                expected and torch.backends.mkl.is_available()
            )
    finally:
        few_queries._sleeps.cache_clear()


@pytest.mark.parametrize(
    "other",
    [
        lambda queries, keys, values: (queries.double(), keys.double(), values.double()),
        lambda queries, keys, values: (queries.bfloat16(), keys.bfloat16(), values.bfloat16()),
        lambda queries, keys, values: (queries, keys, values.bfloat16()),
        lambda queries, keys, values: (queries.expand(-1, -1, 30, -1), keys, values),
        lambda queries, keys, values: (queries, keys.transpose(0, 1).contiguous().transpose(0, 1), values),
        lambda queries, keys, values: (queries.to("meta"), keys.to("meta"), values.to("meta")),
    ],
    ids=["float64", "bfloat16", "other values", "many queries", "rows that lie apart", "another device"],
)
def test_other_tensors_are_left_to_other_kernels(other, monkeypatch):
    monkeypatch.setattr(few_queries, "_LEAST", dict.fromkeys(few_queries._LEAST, 0))
    given = tensors(2, (4, 2))
    assert pays(*given) == HAS_MKL
    assert not pays(*other(*given))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not pays(*given), "its products would be in bfloat16"


def test_caps_sinks_and_gradients_are_left_to_other_kernels(monkeypatch):
    monkeypatch.setattr(parts.few_queries, "pays", lambda *_: True)
    monkeypatch.setattr(parts.few_queries, "attend_few", lambda *_: "by products")
    given = tensors(1)
    assert attend_all(*given, scaling=SCALING) == "by products"
    for more in ({"softcap": 5.0}, {"sink_logits": torch.zeros(6)}):
        assert isinstance(attend_all(*given, scaling=SCALING, **more), torch.Tensor)
    given[0].requires_grad_()
    assert attend_all(*given, scaling=SCALING).requires_grad


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_steps_give_what_they_give_by_the_flash_kernel_recorded_too(
    family, rows, count, threads, monkeypatch, keys_first
):
    threads(count)
    model, ids = tiny.build(family), tiny.random_ids(rows, 90)
    cut, ways = [], []

    def noted(name):
        way = getattr(few_queries, name)
        monkeypatch.setattr(few_queries, name, lambda *given: ways.append(name) or way(*given))

    def noting(keys, values, pieces=few_queries._pieces):
        cut.append(pieces(keys, values))
        return cut[-1]

    def written():
        with attach(model, LMInfinite(window=16, sinks=2)) as handle, torch.no_grad():
            cache = handle.new_cache()
            handle.model(ids[:, :20], **tiny.cached(cache))
            steps = [handle.step(cache, ids[:, at : at + 1]) for at in range(20, 90)]
            assert cache.recorded.replay is not None
        return torch.cat(steps, 1)

    expected = written()
    monkeypatch.setattr(few_queries, "pays", lambda *_: True)
    monkeypatch.setattr(few_queries, "_LEAST_RUN", 1)
    monkeypatch.setattr(few_queries, "_pieces", noting)
    for name in ("_keys_by_queries", "_queries_by_keys"):
        noted(name)
    torch.testing.assert_close(written(), expected, atol=1e-4, rtol=1e-4)
    assert set(ways) == {"_keys_by_queries" if keys_first else "_queries_by_keys"}
    assert (max(cut, default=1) > 1) == (keys_first and count > 1)
