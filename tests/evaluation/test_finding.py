"""Long texts under each way to read: what is read, what is written, what is told of it."""

import json

import pytest
import torch

import everlong.evaluation.finding as finding
from everlong.attention import InfLLM, LMInfinite
from everlong.errors import ConfigurationError, UnknownNameError
from everlong.evaluation.finding import FindingPlan, Found, find, shares
from everlong.evaluation.kept import KeptRows
from everlong.evaluation.long_inputs import Way, answer, make_ways, usable_methods, with_baselines
from everlong.evaluation.needles import Passkey, passkey
from everlong.models.loading import LoadedModel
from tests.tiny import byte_llama, byte_tokenizer

LENGTH, WINDOW = 900, 400
OPTIONS = {"window": str(WINDOW), "sinks": 16, "block": 32, "recalled": 96}


@pytest.fixture(scope="module")
def loaded():
    return LoadedModel(*byte_llama(max_position_embeddings=2048), "tiny", "tiny")


@pytest.fixture(scope="module")
def needle(loaded):
    return passkey(loaded.tokenizer, LENGTH, depth=0.5)


def test_stock_writes_what_the_model_writes(loaded, needle):
    given = answer(loaded, Way("stock"), needle, chunk=100, max_new_tokens=9)
    ids = torch.cat((needle.context, needle.question))[None]
    theirs = loaded.model.generate(ids, max_new_tokens=9, do_sample=False)[0, LENGTH:]
    assert given.text == loaded.tokenizer.decode(theirs, skip_special_tokens=True)
    assert (given.read, given.seen, given.forgotten) == (LENGTH, LENGTH, 0)
    assert given.seconds > 0 and given.decode_ms > 0 and given.bytes["window"] > 0


@pytest.mark.parametrize("cut", ["last", "first-and-last"])
def test_a_cut_text_is_read_by_the_model_as_it_is(loaded, needle, cut):
    (way,) = make_ways([cut], {"window": WINDOW})
    given = answer(loaded, way, needle, max_new_tokens=9)
    room = WINDOW - len(needle.question)
    first = room // 2 if cut == "first-and-last" else 0
    context = needle.context.tolist()
    kept = [*context[:first], *context[LENGTH - len(needle.question) - (room - first) :]]
    assert way.kept(needle).tolist() == kept and len(kept) == room
    ids = torch.tensor([[*kept, *needle.question.tolist()]])
    theirs = loaded.model.generate(ids, max_new_tokens=9, do_sample=False)[0, WINDOW:]
    assert given.text == loaded.tokenizer.decode(theirs, skip_special_tokens=True)
    assert (given.read, given.seen, given.forgotten) == (WINDOW, WINDOW, LENGTH - WINDOW)


def test_a_cut_text_begins_with_the_start_token():
    tokenizer = byte_tokenizer(add_bos=True)
    needle = passkey(tokenizer, LENGTH, depth=0.5)
    for way in make_ways(["last", "first-and-last"], {"window": WINDOW}):
        kept = way.kept(needle).tolist()
        assert kept[0] == tokenizer.bos_token_id and kept.count(kept[0]) == 1
        assert len(kept) + len(needle.question) == WINDOW


def test_no_window_is_wanted_where_nothing_is_cut():
    (way,) = make_ways(["lm-infinite"], {"window": "none"})
    assert way.policy == LMInfinite()


def test_a_text_that_fits_is_not_cut(needle):
    (way,) = make_ways(["last"], {"window": LENGTH})
    assert torch.equal(way.kept(needle), needle.context)


@pytest.mark.parametrize(("name", "forgotten"), [("lm-infinite", LENGTH + 9 - WINDOW), ("inf-llm", 0)])
def test_a_policy_sees_its_window(loaded, needle, name, forgotten):
    (way,) = make_ways([name], OPTIONS if name == "inf-llm" else {"window": WINDOW})
    given = answer(loaded, way, needle, max_new_tokens=9)
    assert (given.read, given.seen, given.forgotten) == (LENGTH, WINDOW, forgotten)


def test_ways_take_the_options_they_have():
    ways = make_ways(["stock", "last", "lm-infinite", "inf-llm"], OPTIONS)
    assert ways[0] == Way("stock") and ways[1] == Way("last", cut="last", window=WINDOW)
    assert ways[2].policy == LMInfinite(sinks=16, window=WINDOW)
    assert ways[3].policy == InfLLM(sinks=16, window=WINDOW, recalled=96, block=32)


@pytest.mark.parametrize(
    ("names", "options", "error", "said"),
    [
        (["lastt"], {}, UnknownNameError, "lastt"),
        (["last"], {}, ConfigurationError, "cut to a window"),
        (["last", "last"], {"window": 9}, ConfigurationError, "once"),
        ([], {}, ConfigurationError, "at least one"),
        (["stock"], {"window": 9}, UnknownNameError, "unknown option of stock 'window'"),
        (["last", "stock"], {"sinks": 9}, UnknownNameError, "sinks"),
        (["last", "lm-infinite"], {"sink": 9}, UnknownNameError, "did you mean 'sinks'"),
        (["last"], {"window": "wide"}, ConfigurationError, "whole number"),
    ],
)
def test_what_is_no_way_is_refused(names, options, error, said):
    with pytest.raises(error, match=said):
        make_ways(names, options)


def test_a_window_that_does_not_hold_the_question_is_refused(needle):
    with pytest.raises(ConfigurationError, match="does not hold the question"):
        Way("last", cut="last", window=20).kept(needle)


def test_every_way_reads_the_same_texts_and_shares_add_up(loaded, monkeypatch):
    plan = FindingPlan((Passkey(), Passkey(digits=12)), (900, 800), samples=3)
    ways = make_ways(["stock", "last"], {"window": WINDOW})
    read = []

    def told(loaded, way, needle, chunk):
        read.append(needle)
        text = needle.answer if way.name == "stock" else "nothing"
        return finding.Answer(text, 9, 9, 0, {"window": 8}, 1.0, 2.0)

    monkeypatch.setattr(finding, "answer", told)
    found = list(find(loaded, ways, plan))
    assert [one.length for one in found] == [800] * 12 + [900] * 12
    texts = [(one.way, needle.answer, needle.depth) for one, needle in zip(found, read, strict=True)]
    for kind in range(4):
        stock, last = texts[6 * kind : 6 * kind + 3], texts[6 * kind + 3 : 6 * kind + 6]
        assert [text[1:] for text in stock] == [text[1:] for text in last]
        assert len({text[1] for text in stock}) == 3 and [text[2] for text in stock] == sorted(
            text[2] for text in stock
        )
    table = shares(found)
    assert [(share.way, share.length, share.task) for share in table][:3] == [
        ("stock", 800, "passkey of 7 digits"),
        ("last", 800, "passkey of 7 digits"),
        ("stock", 800, "passkey of 12 digits"),
    ]
    assert [(share.found.mean, share.told.mean) for share in table[:2]] == [(1, 1), (0, 0)]
    assert [Found.restored(json.loads(json.dumps(one.as_json()))) for one in found] == found


def test_a_passkey_that_does_not_fit_is_said_before_anything_is_read(loaded):
    plan = FindingPlan((Passkey(), Passkey(digits=300)), (900, 950), samples=1)
    with pytest.raises(ConfigurationError, match="passkey of 300 digits does not fit into 900"):
        next(find(loaded, [Way("stock")], plan))


@pytest.mark.parametrize(
    "changes",
    [
        {"lengths": ()},
        {"lengths": (5, 5)},
        {"tasks": ()},
        {"tasks": (Passkey(), Passkey())},
        {"samples": 0},
        {"chunk": 0},
    ],
)
def test_plans_that_cannot_be_are_refused(changes):
    with pytest.raises(ConfigurationError, match=next(iter(changes))):
        FindingPlan(**changes)
