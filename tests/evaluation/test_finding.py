"""Long texts under each way to read: what is read, what is written, what is told of it."""

import dataclasses
import importlib.util
import json
import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch.nn.functional import one_hot

import everlong.evaluation.finding as finding
import everlong.evaluation.long_inputs as long_inputs
from everlong.attention import POLICIES, InfLLM, LMInfinite
from everlong.errors import ConfigurationError, UnknownNameError
from everlong.evaluation.finding import FindingPlan, Found, find, row_key, shares
from everlong.evaluation.kept import KeptRows
from everlong.evaluation.long_inputs import Way, answer, make_ways, usable_methods, with_baselines
from everlong.evaluation.needles import Passkey, passkey
from everlong.models.loading import LoadedModel
from tests.evaluation.expected import Clock
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


def test_what_is_looked_up_every_few_tokens_counts_where_writing_is_timed(loaded, needle, monkeypatch):
    clock, read, written = Clock(), long_inputs.write_on, []

    def timed(stream, ids, logits):
        written.append(ids)
        clock.now += 100.0 if len(written) == 1 else 0.005 if len(written) % 4 == 0 else 0.001
        return read(stream, ids, logits)

    monkeypatch.setattr(long_inputs, "time", clock)
    monkeypatch.setattr(long_inputs, "write_on", timed)
    assert answer(loaded, Way("stock"), needle, max_new_tokens=9).decode_ms == pytest.approx(2)


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


@pytest.mark.parametrize(("name", "forgotten"), [("lm-infinite", LENGTH - WINDOW), ("inf-llm", 0)])
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


def test_stock_and_both_cuts_come_before_the_methods():
    assert with_baselines(["recall", "last", "inf-llm"]) == [
        *("stock", "last", "first-and-last", "recall", "inf-llm")
    ]


def test_what_was_read_is_not_read_again_unless_it_is_another_text_or_another_way(loaded, tmp_path):
    kept = KeptRows(tmp_path / "new" / "found.json", {"model": "tiny"})
    ways = make_ways(["stock", "last"], {"window": WINDOW})
    plan = FindingPlan((Passkey(),), (800, 900), samples=2)
    some = find(loaded, ways, plan, kept)
    before = [next(some) for _ in range(3)]
    some.close()
    again = KeptRows(kept.path, {"model": "tiny"})
    assert len(again.rows) == 3
    read = []

    def noted(*args, **options):
        read.append(args[1].name)
        return answer(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finding, "answer", noted)
        whole = list(find(loaded, ways, plan, again))
        assert whole[:3] == before and read == ["last", "stock", "stock", "last", "last"]
        assert list(find(loaded, ways, plan, again)) == whole and len(read) == 5
        others = [
            (make_ways(["last"], {"window": 300}), plan),
            (ways[1:], FindingPlan((Passkey("library"),), (800, 900), samples=2)),
            (ways[1:], FindingPlan((Passkey(),), (800, 900), samples=4)),
            (ways[1:], FindingPlan((Passkey(),), (800, 900), samples=2, chunk=100)),
        ]
        for count, (other_ways, other) in enumerate(others, 1):
            read.clear()
            found = list(find(loaded, other_ways, other, again))
            assert len(read) == len(found) > 0, count


def test_what_is_written_behind_an_end_token_is_no_answer(loaded, needle, monkeypatch):
    told = loaded.tokenizer.encode(needle.answer, add_special_tokens=False)
    end, weight = loaded.tokenizer.eos_token_id, loaded.model.lm_head.weight
    for first, is_told in (([], True), ([end], False)):
        written = iter([*first, *told, *[end] * 50])
        head = SimpleNamespace(
            weight=weight, logits=lambda _, w=written: one_hot(torch.tensor([next(w)]), 400)
        )
        monkeypatch.setattr(long_inputs, "Head", lambda _, head=head: head)
        assert needle.is_told(answer(loaded, Way("stock"), needle).text) == is_told


def test_a_window_is_the_budget_of_policies_that_have_one():
    ways = {way.name: way.policy for way in make_ways(["snap-kv", "pyramid-kv"], {"window": "300"})}
    assert {name: policy.budget for name, policy in ways.items()} == {"snap-kv": 300, "pyramid-kv": 300}
    assert make_ways(["snap-kv"], {"window": 300, "budget": 200})[0].policy.budget == 200
    assert make_ways(["snap-kv", "lm-infinite"], {"window": 300, "ratio": 0.5})[0].policy.budget is None


def test_what_cannot_work_is_said_before_anything_is_read(loaded, monkeypatch):
    monkeypatch.setattr(finding, "answer", None)
    plan = FindingPlan((Passkey(),), (LENGTH,), samples=1)
    with pytest.raises(ConfigurationError, match="does not hold the question"):
        next(find(loaded, make_ways(["stock", "last"], {"window": 20}), plan))


def test_a_policy_of_ones_own_that_changed_is_read_with_anew(tmp_path, monkeypatch):
    file, keys = tmp_path / "own_policy.py", []
    for value in (1, 22):
        file.write_text(f"VALUE = {value}\nclass Own:\n    def __repr__(self): return 'Own()'\n")
        spec = importlib.util.spec_from_file_location("own_policy", file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "own_policy", module)
        spec.loader.exec_module(module)
        keys.append(row_key(Way("own", module.Own()), FindingPlan((Passkey(),)), Passkey(), 900, 0))
    assert keys[0] != keys[1]


@dataclasses.dataclass(frozen=True)
class Surprised(LMInfinite):
    """Is told how surprising each token was."""

    needs_surprisal: ClassVar[bool] = True
    is_query_aware: ClassVar[bool] = True
    told: ClassVar[list] = []

    def after_forward(self, cache, tokens, surprisal):
        if surprisal is not None:
            self.told.append(surprisal[0])


def test_policies_that_need_surprisal_are_told_it_and_query_aware_ones_are_marked(loaded, needle):
    Surprised.told.clear()
    way = Way("surprised", Surprised(window=WINDOW))
    given = answer(loaded, way, needle, chunk=100, max_new_tokens=9)
    assert (
        given.text == answer(loaded, Way("plain", LMInfinite(window=WINDOW)), needle, max_new_tokens=9).text
    )
    surprisal = torch.cat(Surprised.told)
    assert len(surprisal) == LENGTH + 9 and surprisal[1:].min() > 0, "of what is written, too"
    plan = FindingPlan((Passkey(),), (LENGTH,), samples=1)
    (found,) = find(loaded, [way], plan)
    assert found.is_query_aware and shares([found])[0].is_query_aware
    assert not next(find(loaded, [Way("stock")], plan)).is_query_aware


def test_methods_that_cannot_run_are_left_out_and_said(loaded, monkeypatch):
    monkeypatch.setattr(POLICIES, "_entries", dict(POLICIES._entries))

    @POLICIES.register("impossible")
    @dataclasses.dataclass(frozen=True)
    class Impossible(LMInfinite):
        def __post_init__(self):
            raise ConfigurationError("no such luck")

    usable, refused = usable_methods(loaded, {"window": str(WINDOW), "sinks": "16"})
    assert {"lm-infinite", "streaming-llm", "re-attention"} <= set(usable), refused
    assert "full" not in usable
    assert refused["impossible"] == "no such luck" and not set(usable) & set(refused)
    with pytest.raises(UnknownNameError, match="sinkz"):
        make_ways(with_baselines(usable), {"window": str(WINDOW), "sinkz": 3})
