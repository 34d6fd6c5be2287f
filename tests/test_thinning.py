"""Thinned out, no value of any parameter is lost."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import thinned

SIZES, NAMES = range(9), "abc"


class Item:
    def __init__(self, nodeid: str, *marks: pytest.MarkDecorator, **params: Any) -> None:
        self.nodeid, self._marks = nodeid, [mark.mark for mark in marks]
        if params:
            self.callspec = SimpleNamespace(params=params)

    def iter_markers(self, name: str) -> list[pytest.Mark]:
        assert name == "parametrize"
        return self._marks


def items() -> list[Any]:
    by_name = pytest.mark.parametrize("name", NAMES)  # the other one is a fixture's
    return [
        Item("file.py::one"),
        *(Item(f"file.py::two[{s}-{n}]", by_name, size=s, name=n) for s, n in product(SIZES, NAMES)),
    ]


def test_each_value_of_each_parameter_occurs_and_a_test_without_any_stays() -> None:
    every = items()
    kept = thinned(every, every)
    assert kept == [item for item in every if item in kept] and kept[0].nodeid == "file.py::one"
    assert len(kept) == 1 + len(SIZES), "no more than the parameter with the most values has"
    assert {item.callspec.params["size"] for item in kept[1:]} == set(SIZES)
    assert {item.callspec.params["name"] for item in kept[1:]} == set(NAMES)
    again = items()
    assert [item.nodeid for item in thinned(again, again)] == [item.nodeid for item in kept]
    other = [item.nodeid for item in thinned(again, again, seed="5.17.0")]
    assert other != [item.nodeid for item in kept], "more of them occur in all environments together"


def test_of_what_need_not_vary_one_value_is_enough() -> None:
    every = items()
    for vary, count in (["name"], len(NAMES)), (["size"], len(SIZES)), (["other"], 1):
        kept = thinned(every, every, vary=vary)
        assert len(kept) == 1 + count
        assert all(
            len({item.callspec.params[name] for item in kept[1:]}) == count for name in vary if count > 1
        )


@pytest.mark.parametrize("names", ["a, b", ["a", "b"]])
def test_cases_that_are_written_down_are_all_kept(names: Any) -> None:
    cases = [(1, 2), (1, 3), (2, 2), (2, 3)]
    both = pytest.mark.parametrize(names, cases)
    named = pytest.mark.parametrize(argnames=names, argvalues=cases)
    for mark in (both, named):
        every = [Item(f"file.py::it[{a}-{b}]", mark, a=a, b=b) for a, b in cases]
        assert thinned(every, every) == every
        assert thinned(every, every, vary=["b", "c"]) == every and len(thinned(every, every, vary=["c"])) == 1
        other = pytest.mark.parametrize("c", [5, 6])
        more = [
            Item(f"file.py::it[{a}-{b}-{c}]", other, mark, a=a, b=b, c=c) for a, b in cases for c in (5, 6)
        ]
        assert {each.nodeid[:-3] for each in thinned(more, more)} == {each.nodeid[:-1] for each in every}


def test_others_are_left_alone() -> None:
    every = items()
    assert thinned(every, []) == every
    assert thinned(every, every[:1]) == every
