"""Thinned out, no value of any parameter is lost."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

from tests.conftest import thinned

SIZES, NAMES = range(9), "abc"


def items() -> list[Any]:
    of = [SimpleNamespace(nodeid="file.py::one")]
    for size, name in product(SIZES, NAMES):
        spec = SimpleNamespace(params={"size": size, "name": name})
        of.append(SimpleNamespace(nodeid=f"file.py::two[{size}-{name}]", callspec=spec))
    return [_Hashable(**vars(item)) for item in of]


class _Hashable(SimpleNamespace):
    __hash__ = object.__hash__
    __eq__ = object.__eq__


def test_each_value_of_each_parameter_occurs_and_a_test_without_any_stays() -> None:
    every = items()
    kept = thinned(every, every)
    assert kept == [item for item in every if item in kept] and kept[0].nodeid == "file.py::one"
    assert len(SIZES) < len(kept) <= len(SIZES) + len(NAMES)
    assert {item.callspec.params["size"] for item in kept[1:]} == set(SIZES)
    assert {item.callspec.params["name"] for item in kept[1:]} == set(NAMES)
    again = items()
    assert [item.nodeid for item in thinned(again, again)] == [item.nodeid for item in kept]


def test_others_are_left_alone() -> None:
    every = items()
    assert thinned(every, []) == every
    assert thinned(every, every[:1]) == every
