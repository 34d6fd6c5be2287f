"""Methods side by side: each reads and writes as if it were alone, and everything is told."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from everlong.attention import FullAttention, LMInfinite, StreamingLLM
from everlong.attention.window import LocalWindow
from everlong.errors import ConfigurationError, NumericalError, UnknownNameError, UnsupportedUseError
from everlong.evaluation import comparison as comparison_module
from everlong.evaluation import perplexity as perplexity_module
from everlong.evaluation.comparison import (
    Comparison,
    Method,
    MethodResult,
    Plan,
    compare_methods,
    gathered,
    make_methods,
)
from everlong.evaluation.streams import StockStream
from everlong.evaluation.texts import first_tokens
from everlong.llm import load
from everlong.models.loading import LoadedModel, load_model
from everlong.reading.sampling import Sampling
from tests.evaluation.expected import (
    A_KEY,
    Clock,
    Listening,
    greedy,
    perplexity_of,
    stock_logits,
    surprisal_of,
)
from tests.reference.attention import ReferenceSpec
from tests.reference.generate import reference_generate
from tests.reference.model import reference_logits
from tests.tiny import byte_llama, random_ids

W, G = 20, 3
LENGTH = 70
PLAN = Plan(chunk=16, width=30)
METHODS = [
    Method("stock", None, 6),
    Method("ours", LMInfinite(window=W, sinks=G), 6),
    Method("theirs", StreamingLLM(window=W, sinks=G), 6),
    Method("full", FullAttention(), 6),
]
SPECS = {
    "stock": ReferenceSpec("full"),
    "ours": ReferenceSpec("lm-infinite", G, W, W - 1),
    "theirs": ReferenceSpec("streaming-llm", G, W),
    "full": ReferenceSpec("full"),
}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    model, tokenizer = byte_llama()
    return load_model(model, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return random_ids(1, LENGTH, vocab=128)[0]


@pytest.fixture(scope="module")
def compared(loaded: LoadedModel, ids: Tensor) -> Comparison:
    return compare_methods(loaded, METHODS, ids, text="noise", plan=PLAN)


def decoded(loaded: LoadedModel, ids: Tensor, written: list[int]) -> str:
    """What is written, as it stands after the text."""
    before: str = loaded.tokenizer.decode(ids)
    text: str = loaded.tokenizer.decode([*ids.tolist(), *written], skip_special_tokens=True)
    return text[len(before) :]


@pytest.mark.parametrize("number", range(len(METHODS)))
def test_perplexity_is_the_references_in_each_bucket(
    loaded: LoadedModel, ids: Tensor, compared: Comparison, number: int
) -> None:
    result = compared.results[number]
    expected = surprisal_of(reference_logits(loaded.model, ids[None], SPECS[result.name])[0], ids).tolist()
    assert [(b.start, b.stop, b.tokens) for b in result.buckets] == [(0, 30, 29), (30, 60, 30), (60, 70, 10)]
    for bucket in result.buckets:
        theirs = perplexity_of(expected[bucket.start : bucket.stop])
        assert bucket.perplexity == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("number", range(len(METHODS)))
def test_each_method_writes_on_greedily_from_what_it_remembers(
    loaded: LoadedModel, ids: Tensor, compared: Comparison, number: int
) -> None:
    result, spec = compared.results[number], SPECS[compared.results[number].name]
    if spec.kind == "full":
        tokens = greedy(loaded.model, ids, 6)
    else:
        tokens = reference_generate(loaded.model, ids[None], spec, 6)[0, LENGTH:].tolist()
    assert result.continuation == decoded(loaded, ids, tokens) != ""


def test_accounts_are_those_after_the_text(compared: Comparison) -> None:
    accounts = {r.name: (r.policy, r.seen, r.kept, r.forgotten) for r in compared.results}
    assert accounts == {
        "stock": (None, LENGTH, LENGTH, 0),
        "ours": ("lm-infinite", LENGTH, W, LENGTH - W),
        "theirs": ("streaming-llm", LENGTH, W, LENGTH - W),
        "full": ("full", LENGTH, LENGTH, 0),
    }
    stock, ours, _, _ = compared.results
    assert stock.bytes == {"window": 4 * LENGTH * A_KEY} and stock.options == {}
    assert ours.bytes == {"window": 4 * (W + G) * A_KEY, "ram": 0, "disk": 0}
    assert ours.options == dataclasses.asdict(LMInfinite(window=W, sinks=G).resolve(64))
    for result in compared.results:
        assert [(c.stop, c.tokens) for c in result.chunks] == [
            (16, 16),
            (32, 16),
            (48, 16),
            (64, 16),
            (70, 6),
        ]
        assert result.chunks[-1].bytes == sum(result.bytes.values())


def test_what_was_compared_and_on_what_stands_beside_the_results(compared: Comparison) -> None:
    assert (compared.model, compared.text, compared.tokens) == ("LlamaForCausalLM", "noise", LENGTH)
    assert (compared.plan, compared.training_length) == (PLAN, 64)
    assert compared.machine["torch"] == torch.__version__


def test_within_the_window_every_method_is_the_stock_model(loaded: LoadedModel, ids: Tensor) -> None:
    methods = [Method(m.name, m.policy and dataclasses.replace(m.policy, window=64), 8) for m in METHODS[:3]]
    stock, *others = compare_methods(loaded, methods, ids[:50], text="", plan=PLAN).results
    for other in others:
        assert other.continuation == stock.continuation
        assert [b.perplexity for b in other.buckets] == pytest.approx(
            [b.perplexity for b in stock.buckets], 1e-4
        )


def test_listeners_are_told_as_it_goes(loaded: LoadedModel, ids: Tensor, compared: Comparison) -> None:
    told: list[tuple[str, str, Any]] = []
    again = compare_methods(
        loaded,
        METHODS[:2],
        ids,
        text="noise",
        plan=PLAN,
        progress=lambda name, at: told.append(("read", name, at.tokens)),
        on_text=lambda name, text: told.append(("write", name, text)),
        on_result=lambda result: told.append(("result", result.name, result)),
    )
    for result, before in zip(again.results, compared.results, strict=False):
        mine = [(kind, value) for kind, name, value in told if name == result.name]
        assert [value for kind, value in mine if kind == "read"] == [16, 32, 48, 64, 70]
        assert "".join(value for kind, value in mine if kind == "write") == before.continuation
        assert mine[-1] == ("result", result)
    assert [name for _, name, _ in told] == sorted((name for _, name, _ in told), key=["stock", "ours"].index)


def test_a_policy_without_a_name_is_told_the_surprisal_and_shown_with_its_options(
    loaded: LoadedModel, ids: Tensor
) -> None:
    policy = Listening(window=W, sinks=G)
    (result,) = compare_methods(loaded, [Method("mine", policy, 2)], ids, text="", plan=PLAN).results
    assert result.policy is None and result.options["window"] == W
    heard = policy.heard
    assert torch.cat([tokens for tokens, _ in heard[:5]], 1).tolist() == [ids.tolist()]
    surprisal = torch.cat([surprisal for _, surprisal in heard[:5]], 1)[0, 1:]
    reference = reference_logits(loaded.model, ids[None], SPECS["ours"])[0]
    assert torch.allclose(surprisal, surprisal_of(reference, ids)[1:].float(), atol=1e-3)
    assert heard[5:] == ["writing"]


def test_writing_follows_the_sampling_and_its_seed(loaded: LoadedModel, ids: Tensor) -> None:
    def continuation(**sampling: Any) -> str:
        plan = Plan(chunk=16, width=30, sampling=Sampling(**sampling))
        return compare_methods(loaded, METHODS[:1], ids, text="", plan=plan).results[0].continuation

    drawn = [continuation(temperature=3.0, seed=seed) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    for penalty, window in ((1e6, 256), (0.01, 3)):  # no token twice; three tokens over and over
        tokens = ids.tolist()
        for _ in range(6):
            logits, lately = stock_logits(loaded.model, torch.tensor(tokens))[-1], tokens[-window:]
            seen = logits[lately]
            logits[lately] = torch.where(seen > 0, seen / penalty, seen * penalty)
            tokens.append(int(logits.argmax()))
        found = continuation(repetition_penalty=penalty, repetition_window=window)
        assert found == decoded(loaded, ids, tokens[LENGTH:]) != continuation()


def test_a_method_may_write_nothing(loaded: LoadedModel, ids: Tensor) -> None:
    (result,) = compare_methods(loaded, [Method("stock", None, 0)], ids, text="").results
    assert result.continuation == "" and math.isnan(result.decode_ms)


def test_rates_are_those_of_the_clock(
    loaded: LoadedModel, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, read = Clock(), StockStream.read
    monkeypatch.setattr(comparison_module, "time", clock)
    monkeypatch.setattr(perplexity_module, "time", clock)
    reads = iter([1.0, 2.0, 4.0, 8.0, 100.0] + [0.007, 0.001, 0.003, 0.005, 0.009])

    def timed(self: StockStream, ids: Tensor) -> Tensor:
        clock.now += next(reads)
        return read(self, ids)

    monkeypatch.setattr(StockStream, "read", timed)
    (result,) = compare_methods(loaded, [Method("stock", None, 5)], ids, text="", plan=PLAN).results
    assert result.tokens_per_second == pytest.approx(70 / 115)
    assert result.last_tokens_per_second == pytest.approx((16 / 2 + 16 / 4) / 2)  # the short chunk has no say
    assert result.decode_ms == pytest.approx((7 + 1 + 3 + 5 + 9) / 5)


def test_the_model_is_given_back_even_when_a_method_fails(ids: Tensor) -> None:
    model, tokenizer = byte_llama()
    loaded, told = load_model(model, tokenizer=tokenizer), []
    before = stock_logits(model, ids)

    def poison(result: MethodResult) -> None:
        told.append(result.name)
        with torch.no_grad():
            model.get_input_embeddings().weight[int(ids[40])] = math.nan

    with pytest.raises(NumericalError, match="not finite"):
        compare_methods(loaded, METHODS[:2], ids, text="", plan=PLAN, on_result=poison)
    assert told == ["stock"]
    model.load_state_dict(byte_llama()[0].state_dict())
    assert torch.equal(stock_logits(model, ids), before)


# --- what is pinned before the text -------------------------------------------------------------------


@pytest.fixture(scope="module")
def pinned() -> Tensor:
    return random_ids(1, 9, seed=1, vocab=128)[0]


@pytest.fixture(scope="module")
def compared_after(loaded: LoadedModel, ids: Tensor, pinned: Tensor) -> Comparison:
    return compare_methods(loaded, METHODS, ids, text="noise", plan=PLAN, pinned=pinned)


@pytest.mark.parametrize("number", range(len(METHODS)))
def test_what_is_pinned_stays_and_positions_do_not_count_it(
    loaded: LoadedModel, ids: Tensor, pinned: Tensor, compared_after: Comparison, number: int
) -> None:
    result, whole = compared_after.results[number], torch.cat((pinned, ids))
    spec = SPECS[result.name]
    if spec.kind != "full":
        spec = dataclasses.replace(spec, sinks=len(pinned))
    expected = surprisal_of(reference_logits(loaded.model, whole[None], spec)[0], whole)[len(pinned) :]
    assert [(b.start, b.stop, b.tokens) for b in result.buckets] == [(0, 30, 30), (30, 60, 30), (60, 70, 10)]
    for bucket in result.buckets:
        theirs = perplexity_of(expected[bucket.start : bucket.stop].tolist())
        assert bucket.perplexity == pytest.approx(theirs, rel=1e-3)
    written = (
        greedy(loaded.model, whole, 6)
        if spec.kind == "full"
        else reference_generate(loaded.model, whole[None], spec, 6)[0, len(whole) :].tolist()
    )
    assert result.continuation == decoded(loaded, whole, written) != ""


def test_what_is_pinned_is_told_and_not_clocked(compared_after: Comparison, pinned: Tensor) -> None:
    results, seen = compared_after.results, LENGTH + len(pinned)
    assert [result.options.get("sinks") for result in results] == [None, len(pinned), len(pinned), None]
    assert [(r.seen, r.kept, r.forgotten) for r in results] == [
        (seen, kept, seen - kept) for kept in (seen, W, W, seen)
    ]
    for result in results:
        assert [chunk.stop for chunk in result.chunks] == [16, 32, 48, 64, 70]
    assert (compared_after.tokens, compared_after.pinned) == (LENGTH, len(pinned))
    assert compared_after.as_json()["pinned"] == len(pinned)
    assert (compared_after.training_length, compared_after.trained_until) == (64, 64 - len(pinned))
    assert dataclasses.replace(compared_after, pinned=65).trained_until == 0


def test_pinning_little_leaves_the_sinks_as_they_were(loaded: LoadedModel, ids: Tensor) -> None:
    (result,) = compare_methods(loaded, METHODS[1:2], ids[2:], text="", plan=PLAN, pinned=ids[:2]).results
    assert result.options["sinks"] == G


def test_stock_reads_what_is_pinned_as_the_beginning_of_the_text(loaded: LoadedModel, ids: Tensor) -> None:
    plan = Plan(chunk=16, width=30, sampling=Sampling(repetition_penalty=1e6))
    (whole,) = compare_methods(loaded, METHODS[:1], ids, text="", plan=plan).results
    (parted,) = compare_methods(loaded, METHODS[:1], ids[60:], text="", plan=plan, pinned=ids[:60]).results
    assert (parted.continuation, parted.bytes) == (whole.continuation, whole.bytes)


def test_a_system_text_counts_as_in_a_session_that_pinned_it() -> None:
    model, tokenizer = byte_llama(add_bos=True)
    tokenizer.chat_template = None
    policy, text = LMInfinite(sinks=G), "It is a truth universally acknowledged, that a man " * 3
    with load(model, policy, tokenizer=tokenizer) as llm:
        session = llm.session()
        session.pin("Be terse.")
        score, options = session.score(text), dataclasses.asdict(session.policy)
    excerpt = first_tokens(tokenizer, text, None, system="Be terse.")
    (result,) = compare_methods(
        load_model(model, tokenizer=tokenizer),
        [Method("ours", policy, 0)],
        excerpt.ids,
        text="",
        plan=Plan(width=1000),
        pinned=excerpt.pinned,
    ).results
    assert result.options == options and options["sinks"] == len("<Be terse.\n\n")
    assert result.buckets[0].tokens == score.tokens == len(text)
    assert result.buckets[0].perplexity == pytest.approx(score.perplexity, rel=1e-4)


def test_a_policy_is_told_what_is_pinned_too(loaded: LoadedModel, ids: Tensor) -> None:
    policy = Listening(window=W, sinks=G)
    compare_methods(loaded, [Method("mine", policy, 0)], ids[9:], text="", plan=PLAN, pinned=ids[:9])
    assert torch.cat([tokens for tokens, _ in policy.heard[:-1]], 1).tolist() == [ids.tolist()]
    surprisal = torch.cat([surprisal for _, surprisal in policy.heard[:-1]], 1)[0, 1:]
    reference = reference_logits(loaded.model, ids[None], dataclasses.replace(SPECS["ours"], sinks=9))[0]
    assert torch.allclose(surprisal, surprisal_of(reference, ids)[1:].float(), atol=1e-3)


@pytest.mark.parametrize(
    ("policy", "kind", "message"),
    [
        (LocalWindow(window=W), UnsupportedUseError, "LocalWindow keeps no first tokens"),
        (LMInfinite(window=9, sinks=G), ConfigurationError, "has 9 tokens .* the window only 9"),
    ],
)
def test_a_policy_that_cannot_pin_is_refused_before_anything_is_read(
    loaded: LoadedModel, ids: Tensor, pinned: Tensor, policy: Any, kind: type[Exception], message: str
) -> None:
    told: list[str] = []
    methods = [METHODS[0], Method("mine", policy)]
    with pytest.raises(kind, match=message):
        compare_methods(
            loaded, methods, ids, text="", pinned=pinned, progress=lambda name, at: told.append(name)
        )
    assert told == []


# --- results ------------------------------------------------------------------------------------------


def test_as_json_has_everything_and_null_for_what_is_not_finite(loaded: LoadedModel, ids: Tensor) -> None:
    silent = [dataclasses.replace(method, steps=0) for method in METHODS]
    compared = compare_methods(loaded, silent, ids, text="noise", plan=PLAN)
    plain = json.loads(json.dumps(compared.as_json(), allow_nan=False))
    assert plain == compared.as_json()
    assert plain["tokens"] == LENGTH and plain["plan"]["width"] == 30
    for shown, result in zip(plain["results"], compared.results, strict=True):
        assert shown["decode_ms"] is None
        assert shown["tokens_per_second"] == result.tokens_per_second
        assert shown["last_tokens_per_second"] == result.last_tokens_per_second
        assert shown["buckets"][0]["perplexity"] == result.buckets[0].perplexity
        assert shown["buckets"][0]["high"] is None and shown["buckets"][0]["low"] == 0
        assert shown["chunks"][-1]["stop"] == LENGTH and shown["bytes"] == result.bytes


def test_finished_results_can_be_put_together_alone(loaded: LoadedModel, compared: Comparison) -> None:
    partial = gathered(loaded, compared.results[1:2], tokens=LENGTH, text="noise", plan=PLAN)
    same = dataclasses.replace(compared, results=compared.results[1:2], machine=partial.machine)
    assert partial == same and partial.machine.keys() == compared.machine.keys()


# --- methods from names -------------------------------------------------------------------------------


def test_an_option_goes_to_every_method_that_has_it() -> None:
    methods = make_methods(["stock", " lm-infinite", "streaming-llm", "full"], {"window": "512", "top-k": 5})
    assert methods == [
        Method("stock"),
        Method("lm-infinite", LMInfinite(window=512, top_k=5)),
        Method("streaming-llm", StreamingLLM(window=512)),
        Method("full", FullAttention()),
    ]


@pytest.mark.parametrize(
    ("names", "options", "kind", "message"),
    [
        ([], {}, ConfigurationError, r"at least one method: stock, .*lm-infinite"),
        (["", " "], {}, ConfigurationError, "at least one method"),
        (["full", "full "], {}, ConfigurationError, "once"),
        (["lm-infinit"], {}, UnknownNameError, "did you mean 'lm-infinite'"),
        (["stok"], {}, UnknownNameError, "did you mean 'stock'"),
        (["stock", "full"], {"window": 5}, UnknownNameError, "option of stock, full 'window'"),
        (["lm-infinite"], {"windw": 5}, UnknownNameError, "did you mean 'window'"),
        (["lm-infinite", "streaming-llm"], {"window": 4}, ConfigurationError, "a window of 4 cannot hold"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    names: list[str], options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        make_methods(names, options)


@pytest.mark.parametrize("name", ["chunk", "width"])
def test_a_plan_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} must be at least 1, not 0"):
        Plan(**{name: 0})


@pytest.mark.parametrize(("name", "is_ahead"), [("recall", True), ("lm-infinite", False), ("h2o", False)])
def test_methods_that_recall_for_groups_are_marked(
    loaded: LoadedModel, ids: Tensor, name: str, is_ahead: bool
) -> None:
    (method,) = make_methods([name], {"window": 128, "sinks": 2})
    (compared,) = compare_methods(loaded, [method], ids, text="", plan=PLAN).results
    assert compared.looks_ahead == is_ahead
