"""The floor of a decode step: every kernel once a pass, nothing else; rates are counts over seconds."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from everlong.evaluation import rooflines
from everlong.evaluation.rooflines import Floor, KernelFloor, Rooflines
from everlong.evaluation.work import twin_of, work_of
from everlong.models.packed_weights import Half, Int4, Int8
from everlong.models.packing import pack
from tests.tiny import LOCAL_WINDOW, build


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, key: Any) -> Counter[Any]:
    """Count the calls of a function by what `key` makes of their arguments."""
    calls: Counter[Any] = Counter()
    original = getattr(owner, name)

    def count(*args: Any, **kwargs: Any) -> Any:
        calls[key(*args, **kwargs)] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, count)
    return calls


def test_every_float_weight_is_multiplied_with_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build("llama")
    calls = counted(monkeypatch, F, "linear", lambda rows, weight, bias: (tuple(rows.shape), id(weight)))
    kernels = KernelFloor(model, work_of(model), held=20)
    calls.clear()
    kernels._one_pass(rooflines._folded)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert calls == {((1, layer.in_features), id(layer.weight)): 1 for layer in layers}
    assert kernels.weight_bytes == sum(layer.weight.nbytes for layer in layers)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_packed_weights_are_multiplied_with_once_for_all_layers_that_share_them(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = build("llama")
    work, twin = work_of(model), twin_of(model)
    packing = pack(twin, kind)
    kernels = KernelFloor(twin, work, held=20)
    calls = {k: counted(monkeypatch, k, "__call__", lambda self, rows: id(self)) for k in (Half, Int8, Int4)}
    kernels._one_pass(rooflines._folded)
    assert all(set(each.values()) <= {1} for each in calls.values())
    # q, k, v | o | gate, up | down, in two layers; 48 numbers do not make groups of 32.
    assert len(calls[Int8]) + len(calls[Int4]) == 2 * 4 and len(calls[Half]) == 1
    assert len(calls[Int4]) == (2 * 3 if kind == "int4" else 0)
    assert kernels.weight_bytes == packing.nbytes


def test_each_layer_attends_to_a_window_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gemma3_text")
    kernels = KernelFloor(model, work_of(model), held=50)
    assert [keys.shape[2] for _, keys, _ in kernels._windows] == [LOCAL_WINDOW, 50, LOCAL_WINDOW]
    assert len({keys.data_ptr() for _, keys, _ in kernels._windows}) == 3


def test_both_ways_of_attending_give_the_same() -> None:
    queries, keys, values = torch.randn(1, 6, 1, 8), torch.randn(1, 2, 30, 8), torch.randn(1, 2, 30, 8)
    ways = rooflines._folded, rooflines._grouped, rooflines._ours
    folded, grouped, ours = (way(queries, keys, values) for way in ways)
    assert torch.allclose(folded.view(grouped.shape), grouped, atol=1e-6)
    assert torch.allclose(ours, grouped, atol=1e-6)


def test_a_way_of_attending_that_a_device_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(rooflines, "_grouped", missing)
    model = build("llama")
    assert KernelFloor(model, work_of(model), held=20).measure().window > 0


def test_the_floor_is_medians_and_the_fastest_way_of_attending(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = {
        rooflines._folded: iter([5.0, 9.0, 6.0]),
        rooflines._grouped: iter([8.0, 2.0, 7.0]),
        rooflines._ours: iter([9.0, 9.0, 1.0]),
    }
    products = iter([1.0, 2.0, 3.0, 3.0, 9.0, 3.0, 3.0, 3.0, 3.0])
    monkeypatch.setattr(
        KernelFloor, "_one_pass", lambda self, way: Floor(next(products), next(windows[way]), 0.5)
    )
    monkeypatch.setattr(rooflines, "compiled", lambda: None)  # a fourth way, where there is a compiler
    model = build("llama")
    floor = KernelFloor(model, work_of(model), held=20).measure()
    assert floor == Floor(products=3.0, window=6.0, head=0.5) and floor.step == 9.5


def test_rates_are_counts_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooflines, "_SIDE", {"cpu": 10})
    monkeypatch.setattr(rooflines, "_BUFFER", {"cpu": 4000})
    monkeypatch.setattr(rooflines, "_seconds", lambda run: run() is None or 2.0)
    machine = Rooflines(torch.device("cpu"), torch.float32)
    assert (machine.flops(), machine.bandwidth()) == (2 * 10**3 / 2, 4000 / 2)
