"""The speed report: what was measured at which depth, in which order; what is left of it when interrupted."""

from __future__ import annotations

import json
from contextlib import closing
from typing import Any

import pytest
import torch
from torch import nn

from everlong.attention import FullAttention, LMInfinite
from everlong.errors import ConfigurationError, UnknownNameError, UnsupportedUseError
from everlong.evaluation import machine_speed, rooflines
from everlong.evaluation.machine_speed import measure_speed
from everlong.evaluation.rooflines import Floor, KernelFloor, Rooflines
from everlong.evaluation.speed_report import SpeedPlan, SpeedReport
from everlong.evaluation.speed_table import speed_table
from everlong.models.loading import LoadedModel, load_model
from tests.evaluation.expected import A_KEY, stock_logits
from tests.tiny import build, byte_llama, byte_tokenizer
from tests.tiny import random_ids as tokens

W, G = 20, 3
A_TOKEN = 2 * 2 * A_KEY
PLAN = SpeedPlan(depths=(60, 30), repeats=2, chunk=8, steps=3)
POLICY = LMInfinite(window=W, sinks=G)


@pytest.fixture(autouse=True)
def _small_rooflines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooflines, "_SIDE", {"cpu": 16})
    monkeypatch.setattr(rooflines, "_BUFFER", {"cpu": 4096})


@pytest.fixture
def loaded() -> LoadedModel:
    model, tokenizer = byte_llama()
    return load_model(model, tokenizer=tokenizer)


def of_family(family: str) -> LoadedModel:
    return load_model(build(family), tokenizer=byte_tokenizer())


def text_of(report: SpeedReport) -> str:
    from rich.console import Console

    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(speed_table(report))
    return console.export_text()


# --- what is asked for --------------------------------------------------------------------------------


@pytest.mark.parametrize("depths", [(), (0,), (-5, 8), (8, 8)])
def test_depths_that_cannot_be_measured_are_refused(depths: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match="depths are numbers of tokens"):
        SpeedPlan(depths=depths)


@pytest.mark.parametrize("wrong", ["repeats", "chunk", "steps"])
def test_nothing_is_no_plan(wrong: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{wrong} must be at least 1"):
        SpeedPlan(**{wrong: 0})


def test_a_depth_whose_cache_does_not_fit_is_refused_before_it_is_filled(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_speed, "available_bytes", lambda device: 3 * 60 * A_TOKEN - 1)
    with pytest.raises(ConfigurationError, match=r"60 tokens takes 46 kB .* smaller --depths"):
        next(measure_speed(loaded, POLICY, PLAN))
    monkeypatch.setattr(machine_speed, "available_bytes", lambda device: 3 * 60 * A_TOKEN)
    assert next(measure_speed(loaded, POLICY, PLAN)).done == 0
    monkeypatch.setattr(machine_speed, "available_bytes", lambda device: None)
    assert next(measure_speed(loaded, POLICY, PLAN)).done == 0


def test_weights_that_there_are_not_are_refused(loaded: LoadedModel) -> None:
    with pytest.raises(UnknownNameError, match="int4"):
        next(measure_speed(loaded, POLICY, PLAN, weights="int3"))
    half = load_model(build("llama").to(torch.float16), tokenizer=byte_tokenizer())
    with pytest.raises(UnsupportedUseError, match="use 'float'"):
        next(measure_speed(half, POLICY, PLAN, weights="int8"))


# --- what is measured ---------------------------------------------------------------------------------


def test_there_is_a_report_after_every_repeat_and_the_last_has_all(loaded: LoadedModel) -> None:
    reports = list(measure_speed(loaded, POLICY, PLAN))
    progress = [[(row.depth, row.repeats) for row in report.rows] for report in reports]
    assert progress == [[], [(30, 1)], [(30, 2)], [(30, 2), (60, 1)], [(30, 2), (60, 2)]]
    done = [report.done for report in reports]
    assert done == sorted(set(done)) and (done[0], done[-1]) == (0, pytest.approx(1))
    assert len({report.expected_seconds for report in reports}) == 1 and reports[0].expected_seconds > 0
    last = reports[-1]
    assert (last.policy, last.options["window"], last.weights) == ("lm-infinite", W, "float")
    for row in last.rows:
        assert row.stock.bytes == row.depth * A_TOKEN
        assert row.ours.bytes == (W + G) * A_TOKEN  # sinks a second time, unrotated
        assert row.stock.prefill_flops == last.work.prefill_flops(row.depth, 8, None)
        assert row.ours.prefill_flops == last.work.prefill_flops(10**6, 8, W)
        assert row.decode_bytes == last.weight_bytes + W * A_TOKEN
        assert row.stock.allocated is row.ours.allocated is None


def test_stock_and_ours_are_measured_in_turn_and_the_machine_between_them(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[Any] = []
    times = {"prefill": iter([4.0, 2.0, 8.0, 1.0, 6.0, 3.0]), "flops": iter([0.0] * 2 + [1e6, 3e6, 2e6])}
    decode = iter([[0.1, 0.3, 0.2], [0.01] * 3, [0.4] * 3, [0.03] * 3, [0.3] * 3, [0.02] * 3])

    def prefill(stream: Any, ids: Any) -> float:
        log.append((type(stream).__name__, len(ids), stream.kept))
        stream.read(ids)
        return next(times["prefill"])

    def step(stream: Any, ids: Any, head: nn.Module) -> list[float]:
        log.append((len(ids), tuple(head(torch.zeros(1, 32)).shape)))
        stream.read(ids)
        return next(decode)

    def logged(name: str, value: Any) -> Any:
        log.append(name)
        return value

    monkeypatch.setattr(machine_speed, "prefill_seconds", prefill)
    monkeypatch.setattr(machine_speed, "decode_seconds", step)
    monkeypatch.setattr(KernelFloor, "measure", lambda self: logged("floor", Floor(0.001, 0.003, 0.001)))
    monkeypatch.setattr(Rooflines, "flops", lambda self: logged("flops", next(times["flops"], 1e6) or 1e6))
    monkeypatch.setattr(Rooflines, "bandwidth", lambda self: logged("bus", 1e9))
    *_, report = measure_speed(loaded, POLICY, SpeedPlan((30,), repeats=3, chunk=8, steps=3))
    (row,) = report.rows
    a_repeat = [("StockStream", 8, 30), (3, (1, 259)), ("PolicyStream", 8, W), (3, (1, 259))]
    assert log[4:] == 3 * [*a_repeat, "floor", "flops", "bus"]
    assert (row.stock.decode_ms, row.ours.decode_ms) == (pytest.approx(300), pytest.approx(20))
    assert row.stock.prefill_tokens_per_second == 8 / 6
    assert row.ours.prefill_tokens_per_second == 8 / 2
    assert row.matrix_flops == 2e6
    assert row.ours.prefill_share == pytest.approx(report.work.prefill_flops(W, 8, W) / 2 / 2e6)
    assert row.step_to_floor == pytest.approx(20 / 5)
    assert row.bus_ms == pytest.approx(1000 * (report.weight_bytes + W * A_TOKEN) / 1e9)


def test_what_keeps_everything_is_measured_at_the_depth_every_time(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = machine_speed.prefill_seconds

    def prefill(stream: Any, ids: Any) -> float:
        seen.append(stream.seen)
        return original(stream, ids)

    monkeypatch.setattr(machine_speed, "prefill_seconds", prefill)
    *_, report = measure_speed(loaded, FullAttention(), PLAN)
    assert seen == [30] * 4 + [60] * 4
    assert report.rows[1].decode_bytes == report.weight_bytes + 60 * A_TOKEN


def test_what_filling_took_of_a_devices_memory_is_told_where_it_is_known(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = iter([1000, 1100, 1150, 1050, 1300, 1300])  # the window is filled once, stock's cache twice
    monkeypatch.setattr(machine_speed, "allocated_bytes", lambda device: next(account))
    *_, report = measure_speed(loaded, POLICY, PLAN)
    assert [(row.stock.allocated, row.ours.allocated) for row in report.rows] == [(100, 50), (250, 50)]
    assert "filling our window took 50 bytes of the device's memory" in text_of(report)


def test_local_layers_and_shared_keys_are_measured_too() -> None:
    for family in ("gemma3_text", "gemma4_text"):
        *_, report = measure_speed(of_family(family), POLICY, PLAN)
        assert [row.repeats for row in report.rows] == [2, 2]
        assert report.rows[0].ours.prefill_share is not None


def test_packed_weights_are_ours_alone(loaded: LoadedModel) -> None:
    for weights in ("int8", "int4"):
        *_, report = measure_speed(loaded, POLICY, PLAN, weights=weights)
        assert report.weights == weights
        assert report.weight_bytes < 0.6 * 4 * (report.work.weights + report.work.head)
    assert {type(m) for m in loaded.model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}


def test_an_interrupted_measurement_leaves_the_model_as_it_was(loaded: LoadedModel) -> None:
    ids = tokens(1, 30)[0]
    before = stock_logits(loaded.model, ids)
    with closing(measure_speed(loaded, POLICY, PLAN, weights="int8")) as reports:
        next(reports)
        partial = next(reports)
        assert [(row.depth, row.repeats) for row in partial.rows] == [(30, 1)]
    assert torch.equal(stock_logits(loaded.model, ids), before)
    text = text_of(partial)
    assert "unfinished: 1 of 2 repeats at 30" in text and "not reached: 60" in text


# --- how it is shown ----------------------------------------------------------------------------------


def test_json_has_everything_and_the_ratios(loaded: LoadedModel) -> None:
    *_, report = measure_speed(loaded, POLICY, PLAN)
    shown = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert shown.keys() == {
        *("model", "policy", "options", "weights", "dtype", "device", "plan", "work", "weight_bytes"),
        *("rows", "machine"),
    }
    assert shown["plan"] == {"depths": [30, 60], "repeats": 2, "chunk": 8, "steps": 3}
    assert (shown["work"]["linear"], shown["work"]["layers"]) == (14, 2)
    row, measured = shown["rows"][0], report.rows[0]
    assert row.keys() == {
        *("depth", "repeats", "stock", "ours", "floor", "matrix_flops", "bandwidth", "decode_bytes"),
        *("ratios", "step_to_floor", "bus_ms", "products_tokens_per_second"),
    }
    assert row["ratios"]["decode"] == row["stock"]["decode_ms"] / row["ours"]["decode_ms"]
    assert row["ratios"]["bytes"] == 30 / (W + G)
    assert row["floor"]["window_ms"] == 1000 * measured.floor.window
    assert row["products_tokens_per_second"] == measured.matrix_flops / (2 * report.work.weights)


def test_the_table_has_a_column_a_depth_and_the_rooflines_below(loaded: LoadedModel) -> None:
    *_, report = measure_speed(loaded, POLICY, PLAN)
    text = text_of(report)
    row = report.rows[-1]
    for word in ("30", "60", "lm-infinite", "its kernels alone", "GFLOP/s", "GB/s", "window 20, full at"):
        assert word in text
    assert f"{row.ours.decode_ms:.1f}" in text and f"{row.stock.bytes / row.ours.bytes:.2f}x" in text
    assert "unfinished" not in text and "not reached" not in text


def test_of_experts_nothing_is_claimed_that_was_not_counted() -> None:
    *_, report = measure_speed(of_family("mixtral"), POLICY, PLAN)
    shown = report.as_json()["rows"][0]
    assert shown["ours"]["prefill_share"] is shown["step_to_floor"] is shown["bus_ms"] is None
    assert shown["products_tokens_per_second"] is None
    text = text_of(report)
    assert "cannot be counted" in text and "kernels alone" not in text
