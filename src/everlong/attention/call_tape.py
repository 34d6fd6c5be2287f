"""Records a step as the calls of PyTorch that it makes, and repeats them into the same memory.

On a CPU a step of writing is a thousand small calls beside the few that take long. Repeated, they need no
modules, no views, no decisions and no new memory: what remains of each is the operation itself. The tape
holds the tensors that the calls were given, so it follows weights that are written to, or moved, in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from everlong.errors import UnsupportedUseError
from everlong.models.collector import paused

Call = Callable[[], Any]

_LOOKS = {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero"} | {
    f"__{name}__" for name in ("bool", "int", "float", "index", "contains")
}
"""What lets Python look at the numbers of a tensor, and decide by them."""
_SIZES = {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount"}
"""What returns more or less, depending on numbers."""
_COPY = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "clone", "contiguous"}
_MAY_DO_NOTHING = _COPY | {"requires_grad_", "detach_"}
_HOLDERS = (torch, torch._C._nn)  # of functions that may take `out`


class CallTapes:
    """Records steps on a CPU; see :class:`~everlong.attention.recording.Recorder`."""

    eager_steps = 32
    follows_tensors = True

    def record(self, run: Callable[[], Tensor]) -> tuple[Call, Tensor]:
        """Run something, and keep the calls that its result, and what it writes to, depend on."""
        with torch.inference_mode(), paused():
            with _Tape() as tape:
                result = run()
            calls = tape.calls(result)

        def replay() -> None:
            with torch.inference_mode():
                for call in calls:
                    call()

        return replay, result


@dataclass(frozen=True, eq=False)
class _Note:
    """One call.

    Attributes
    ----------
    call : callable
        Repeats it; returns what is to be copied into `copied`.
    read : set of int
        The storages it was given.
    written : set of int
        The storages it writes to.
    copied : list of Tensor
        What its outputs are copied into, in their order; empty: it writes by itself.
    is_single : bool
        Whether its output is a tensor, not a sequence of them.
    """

    call: Call
    read: set[int]
    written: set[int]
    copied: list[Tensor]
    is_single: bool

    def compiled(self, needed: set[int]) -> Call:
        """Return what repeats the call for the sake of the storages that are needed."""
        if not self.copied:
            return self.call
        call, wanted = self.call, [(i, x) for i, x in enumerate(self.copied) if _storage(x) in needed]
        if self.is_single:
            into = self.copied[0]
            return lambda: into.copy_(call())

        def repeat() -> None:
            outputs = list(_tensors(call()))
            for number, into in wanted:
                into.copy_(outputs[number])

        return repeat


class _Tape(TorchFunctionMode):
    """What is called while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self._notes: list[_Note] = []
        self._made: dict[int, Tensor] = {}
        self._ways: dict[tuple[Any, bool], Callable[..., Call] | None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call, and take note if something was made or written."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in _LOOKS or _depends_in_size(name, args):
            raise UnsupportedUseError(f"{name}() lets numbers decide what comes next: it cannot be recorded")
        output = func(*args, **kwargs)
        given = list(_tensors((args, tuple(kwargs.values()))))
        read = set(map(_storage, given))
        if name == "__setitem__" or any(output is tensor for tensor in given):
            if name not in _MAY_DO_NOTHING:
                target = args[0] if output is None else output
                self._note(partial(func, *args, **kwargs), read, [target], [])
            return output
        made = [tensor for tensor in _tensors(output) if _storage(tensor) not in read]
        if not made:
            return output  # a view, or no tensor at all
        self._made.update({_storage(tensor): tensor for tensor in made})
        is_single = output is made[0]
        if is_single and (call := self._into(output, func, args, kwargs)) is not None:
            self._note(call, read, made, [])
        elif len(made) == len(list(_tensors(output))):
            self._note(partial(func, *args, **kwargs), read, made, made, is_single)
        else:
            raise UnsupportedUseError(f"{name}() returns new tensors beside old ones: it cannot be recorded")
        return output

    def calls(self, result: Tensor) -> list[Call]:
        """Return what repeats the calls that `result`, and what was there before, depend on."""
        needed, kept = {_storage(result)}, []
        for note in reversed(self._notes):
            if any(storage in needed or storage not in self._made for storage in note.written):
                kept.append(note.compiled(needed))
                needed |= note.read
        return kept[::-1]

    def _note(
        self, call: Call, read: set[int], written: list[Tensor], copied: list[Tensor], is_single: bool = False
    ) -> None:
        self._notes.append(_Note(call, read, set(map(_storage, written)), copied, is_single))

    def _into(self, output: Tensor, func: Any, args: Any, kwargs: Any) -> Call | None:
        """Return a call that writes `output` where it lies, as PyTorch's own do with `out`; None: none does.

        Each way is tried, and believed only if it gives the same.
        """
        kwargs = {name: value for name, value in kwargs.items() if name != "inplace"}
        key = func, bool(kwargs)
        if key not in self._ways:
            self._ways[key] = next(
                (way for way in _ways(func) if _gives(output, _call(way, output, args, kwargs))), None
            )
        way = self._ways[key]
        call = None if way is None else _call(way, output, args, kwargs)
        return call if _gives(output, call) else None


def _ways(func: Any) -> Iterator[Callable[..., Call]]:
    """Yield how a function may be called so that it writes its output into a tensor that is there."""
    name = func.__name__.strip("_")
    if name in _COPY:
        yield lambda out, args, kwargs: partial(out.copy_, args[0])
    for function in (func, *(getattr(holder, name, None) for holder in _HOLDERS)):
        if function is not None:
            yield lambda out, args, kwargs, f=function: partial(f, *args, **kwargs, out=out)


def _call(way: Callable[..., Call], output: Tensor, args: Any, kwargs: Any) -> Call | None:
    try:
        return way(output, args, kwargs)
    except (TypeError, IndexError):
        return None


def _gives(output: Tensor, call: Call | None) -> bool:
    """Whether a call writes into `output` what stands there."""
    if call is None:
        return False
    expected = output.clone()
    try:
        output.zero_()
        call()
        return torch.equal(output, expected)
    except (TypeError, RuntimeError):  # it takes no `out`, or takes other arguments
        return False
    finally:
        output.copy_(expected)


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors among arguments or outputs, those in sequences too."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


def _depends_in_size(name: str, args: Any) -> bool:
    """Whether how much a function returns depends on numbers."""
    if name == "__getitem__":
        return any(tensor.dtype == torch.bool for tensor in _tensors(args[1]))
    if name == "repeat_interleave":
        return any(isinstance(value, Tensor) for value in args[1:])
    return name in _SIZES or (name == "where" and len(args) == 1)


def _storage(tensor: Tensor) -> int:
    storage: int = tensor.untyped_storage()._cdata
    return storage
