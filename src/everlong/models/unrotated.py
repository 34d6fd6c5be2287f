"""Spares an attached model's attention modules the rotation by nothing.

With identities for rotary tables, ``apply_rotary_pos_emb`` computes what it is given, at the price of a few
passes over queries and keys in every layer. Attention modules find that function among the globals of
their modelling file; each gets its own forward, the same code with other globals, until the end.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

_NAME = "apply_rotary_pos_emb"


@contextmanager
def unrotated(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let the forward of each of `modules` leave rotation out, where it is found in the usual place."""
    changed = []
    try:
        for module in modules:
            forward = _without_rotation(type(module).forward)
            if forward is not None and "forward" not in module.__dict__:  # accelerate's hooks put one there
                module.__dict__["forward"] = MethodType(forward, module)
                changed.append(module)
        yield
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)


def _without_rotation(forward: Callable[..., Any]) -> FunctionType | None:
    """Return `forward` with a rotation that does nothing; None if it does not call one by its usual name."""
    function = inspect.unwrap(forward)
    if not isinstance(function, FunctionType) or _NAME not in function.__code__.co_names:
        return None
    rotation = function.__globals__.get(_NAME)
    names = list(inspect.signature(rotation).parameters) if callable(rotation) else []
    if "cos" not in names:
        return None
    ours = {**function.__globals__, _NAME: _given_back(names.index("cos"))}
    copy = FunctionType(
        function.__code__, ours, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _given_back(count: int) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """Return a function that gives its first `count` arguments back."""

    def give_back(*arguments: Any, **_: Any) -> Any:
        return arguments[0] if count == 1 else arguments[:count]

    return give_back
