"""How tests are thinned out: not all combinations of their parameters, but each value of each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thin",
        action="store_true",
        help="of the combinations of a test's parameters run so many only that each value of each occurs",
    )
    parser.addoption(
        "--only-vary",
        metavar="NAMES",
        type=lambda names: names.split(","),
        help="with --thin: of the parameters of these names alone each value must occur, one of each other",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    is_thin = config.getoption("thin")
    thin = [item for item in items if is_thin or item.get_closest_marker("thin")]
    kept = thinned(items, thin, seed=version("transformers"), vary=config.getoption("only_vary"))
    dropped = set(items).difference(kept)
    if dropped:
        config.hook.pytest_deselected(items=[item for item in items if item in dropped])
        items[:] = kept


def thinned(
    items: Sequence[Any], thin: Sequence[Any], seed: str = "", vary: Sequence[str] | None = None
) -> list[Any]:
    """Return tests, in order: of those in `thin` so many that each value of each parameter occurs.

    Parameters that are given together are one: of cases written down none is lost. Which combinations stay is
    drawn, the same at any time and in any process, and others with another `seed`. With `vary`, only
    values of parameters of these names must occur; a test always keeps one.
    """
    combinations: dict[str, list[Any]] = {}
    for item in thin:
        combinations.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = set(items) - set(thin)
    for name, some in combinations.items():
        left = {item: _values(item, vary) for item in random.Random(seed + name).sample(some, len(some))}
        while left:
            best = max(left, key=lambda item: len(left[item]))
            seen = left.pop(best)
            kept.add(best)
            left = {item: new for item, values in left.items() if (new := values - seen)}
    return [item for item in items if item in kept]


def _values(item: Any, vary: Sequence[str] | None) -> set[frozenset[tuple[str, str]]]:
    """Return the values of what must vary in a test, those that are given together as one; never none."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    left, found = {name: repr(value) for name, value in params.items()}, set()
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        together = names.replace(" ", "").split(",") if isinstance(names, str) else names
        found.add(frozenset((name, left.pop(name)) for name in together if name in left))
    found |= {frozenset([pair]) for pair in left.items()}
    return {some for some in found if vary is None or any(name in vary for name, _ in some)} or {frozenset()}
