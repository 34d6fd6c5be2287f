"""lm-evaluation-harness: what it asks our model comes out as of its own, under policies too, and uncut."""

from __future__ import annotations

import builtins
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from everlong.attention import LMInfinite
from everlong.errors import ConfigurationError
from everlong.llm import LLM
from everlong.memory.store import MemoryStore
from tests.memory.adapters import adapter_of, record
from tests.tiny import byte_llama, byte_tokenizer

LIMIT = 64  # tokens that the tiny model was trained on
LONG = ("It is a truth universally acknowledged, that a single man must be in want of a wife. " * 3).strip()
CONTEXTS = [("Bees make", " honey"), ("Bees make", " wax."), ("The river", " rose"), ("", "Rain")]


def test_without_the_package_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("lm_eval"):
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "everlong.evaluation.harness", raising=False)
    with pytest.raises(ConfigurationError, match=r"pip install 'everlong\[harness\]'"):
        importlib.import_module("everlong.evaluation.harness")


@pytest.fixture(scope="module")
def harness() -> Any:
    pytest.importorskip("lm_eval")
    return importlib.import_module("everlong.evaluation.harness")


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    model, tokenizer = byte_llama(max_position_embeddings=LIMIT)
    with LLM(model, tokenizer, "tiny", LMInfinite(window=400, sinks=4)) as llm:
        yield llm


@pytest.fixture(scope="module")
def theirs(harness: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = byte_llama(max_position_embeddings=LIMIT)
    return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1)


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def test_likelihoods_are_the_harnesss_own(harness: Any, llm: LLM, theirs: Any) -> None:
    ours = harness.EverlongLM(llm, chunk=5)
    requests = asked("loglikelihood", *CONTEXTS)
    found, expected = ours.loglikelihood(requests, True), theirs.loglikelihood(requests, True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    whole = asked("loglikelihood_rolling", (LONG[:60],), ("Bees",))
    assert ours.loglikelihood_rolling(whole) == pytest.approx(theirs.loglikelihood_rolling(whole), abs=1e-3)


def test_what_greed_would_write_is_told(harness: Any, llm: LLM) -> None:
    session = llm.session()
    session.read(list(b"Bees make"))
    text = session.generate(1).text
    model = harness.EverlongLM(llm)
    token = model.tok_encode(text)
    found = model._loglikelihood_tokens([(("", ""), list(b"Bees make"), token)], True)
    assert found[0][1] == (len(token) == 1)


def test_what_is_written_is_the_harnesss_own(harness: Any, llm: LLM, theirs: Any) -> None:
    ours = harness.EverlongLM(llm)
    options = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    requests = asked("generate_until", ("Bees make", options), ("The river", {**options, "until": "e"}))
    assert ours.generate_until(requests, True) == theirs.generate_until(requests, True)


def test_texts_longer_than_the_training_length_are_read_whole(harness: Any, llm: LLM) -> None:
    whole = harness.EverlongLM(llm, chunk=50)
    cut = harness.EverlongLM(llm, attention=LMInfinite(window=40, sinks=4), chunk=50)
    request = asked("loglikelihood", (LONG, " Mr. Darcy"))
    model, _ = byte_llama(max_position_embeddings=LIMIT)
    ids = torch.tensor([[*LONG.encode(), *b" Mr. Darcy"]])
    with torch.no_grad():
        logs = model(ids).logits[0, len(LONG) - 1 : -1].log_softmax(-1)
    expected = float(logs.gather(1, ids[0, len(LONG) :, None]).sum())
    assert whole.loglikelihood(request, True)[0][0] == pytest.approx(expected, abs=1e-3)
    assert cut.loglikelihood(request, True)[0][0] != pytest.approx(expected, abs=1e-2)
    session = llm.session()
    session.read(list(LONG.encode()))
    options = {"until": [], "max_gen_toks": 9}
    (text,) = whole.generate_until(asked("generate_until", (LONG, options)), True)
    assert text == session.generate(9).text
    (sum_of_all,) = whole.loglikelihood_rolling(asked("loglikelihood_rolling", (LONG,)))
    scored = llm.session(surprisal=True)
    scored.read([whole.prefix_token_id, *LONG.encode()])
    assert sum_of_all == pytest.approx(-scored._tape.driver.nll_sum, rel=1e-4)


def test_a_memory_counts(harness: Any, llm: LLM, tmp_path: Path) -> None:
    store = MemoryStore(tmp_path)
    adapter = adapter_of(byte_llama(max_position_embeddings=LIMIT)[0])
    store.add(record("bees", base_hash=llm._attached.weights_hash, rank=8), adapter)
    request = asked("loglikelihood", ("Bees make", " honey"))
    without = harness.EverlongLM(llm).loglikelihood(request, True)[0][0]
    found = harness.EverlongLM(llm, memories=["bees"], store=store).loglikelihood(request, True)[0][0]
    session = llm.session(memories=["bees"], store=store)
    session.read(list(b"Bees make"))
    assert found == pytest.approx(-session.score(" honey").surprisal.sum().item(), abs=1e-4)
    assert abs(found - without) > 1e-2


def test_a_task_runs_from_a_file(harness: Any, llm: LLM, tmp_path: Path, monkeypatch: Any) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    rows = [{"q": f"{LONG}{name} makes", "a": 0, "b": [" honey", " wax"]} for name in ("Ann", "Bob")]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "bees",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "rows.json")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{b}}",
        "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "acc"}],
    }
    model = harness.EverlongLM(llm)
    manager = TaskManager(include_defaults=False)  # its own thousands are not looked through
    found: Any = lm_eval.simple_evaluate(model, tasks=[task], bootstrap_iters=0, task_manager=manager)
    right = 0
    for row in rows:
        session = llm.session()
        session.read(list(row["q"].encode()))
        scores = [-session.score(choice).surprisal.sum() for choice in row["b"]]
        right += scores[0] > scores[1]
    assert found["results"]["bees"]["acc,none"] == right / 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_length": 100}, "max_length would cut texts"),
        ({"batch_size": 4}, "batch_size=4 cannot work"),
        ({"attention": "inflm"}, "did you mean 'inf-llm'"),
        ({"memories": ["nobody"]}, "nobody"),
    ],
)
def test_what_cannot_work_is_refused(harness: Any, llm: LLM, tmp_path: Path, options: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        harness.EverlongLM(llm, store=MemoryStore(tmp_path), **options)


def test_ways_to_draw_that_we_do_not_know_are_refused(harness: Any, llm: LLM) -> None:
    sampling = harness._sampling
    assert sampling({"do_sample": False, "temperature": 0.0}).temperature == 0
    assert sampling({"do_sample": True, "top_k": 5}) == harness.Sampling(1.0, top_k=5, seed=0)
    with pytest.raises(ConfigurationError, match="length_penalty"):
        sampling({"length_penalty": 2})
    with pytest.raises(ConfigurationError, match="num_beams=3"):
        sampling({"num_beams": 3})


def test_a_text_of_nothing_begins_with_the_start_token(harness: Any, llm: LLM) -> None:
    options = {"until": [], "max_gen_toks": 3}
    (text,) = harness.EverlongLM(llm).generate_until(asked("generate_until", ("", options)), True)
    session = llm.session()
    session.read([byte_tokenizer().bos_token_id])
    assert text == session.generate(3).text
