"""Records a step as the calls of PyTorch that it makes, and repeats them into the same memory.

On a CPU a step of writing is a thousand small calls beside the few that take long. Repeated, they need no
modules, no views, no decisions and no new memory: what remains of each is the operation itself. The tape
holds the tensors that the calls were given, so it follows weights that are written to in place. PyTorch's own
calls follow those that are moved, too; compiled kernels go on with the memory that they were recorded with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from everlong.attention.call_notes import Call, Note, mapped, shortest, storage_of, tensors_in
from everlong.errors import UnsupportedUseError
from everlong.kernels.loading import recording, wanted
from everlong.kernels.team import has_team
from everlong.models.collector import paused

_LOOKS = {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero"} | {
    f"__{name}__" for name in ("bool", "int", "float", "index", "contains")
}
"""What lets Python look at the numbers of a tensor, and decide by them."""
_SIZES = {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount"}
"""What returns more or less, depending on numbers."""
_RESHAPING = {"t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_", "resize_"}
"""What makes a tensor lie another way, in place: repeated, it would lie another way again."""
_COPY = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "clone", "contiguous"}
_MAY_DO_NOTHING = _COPY | {"requires_grad_", "detach_"}
_HOLDERS = (torch, torch._C._nn)  # of functions that may take `out`


class CallTapes:
    """Records steps on a CPU; see :class:`~everlong.attention.recording.Recorder`."""

    eager_steps = 16

    def __init__(self) -> None:
        self.follows_tensors = not wanted()  # kernels go by addresses
        self.grows = wanted() and has_team()

    def run(self, run: Callable[[], Tensor]) -> Tensor:
        """Run something as it would be recorded."""
        with torch.inference_mode(), recording():
            return run()

    def record(self, run: Callable[[], Tensor]) -> tuple[Call, Tensor]:
        """Run something, and keep the calls that its result, and what it writes to, depend on."""
        with torch.inference_mode(), paused(), recording():
            with _Tape() as tape:
                result = run()
            calls = tape.calls(result)

        def replay() -> None:
            with torch.inference_mode():
                for call in calls:
                    call()

        return replay, result


class _Tape(TorchFunctionMode):
    """What is called while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self._notes: list[Note] = []
        self._made: dict[int, Tensor] = {}
        self._ways: dict[tuple[Any, bool], Callable[..., partial[Any]] | None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call, and take note if something was made or written."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in _LOOKS or _depends_in_size(name, args):
            raise UnsupportedUseError(f"{name}() lets numbers decide what comes next: it cannot be recorded")
        if name in _RESHAPING or name.startswith("_foreach") or isinstance(kwargs.get("out"), (tuple, list)):
            raise UnsupportedUseError(
                f"{name}() changes several tensors, or how one lies: it cannot be recorded"
            )
        output = func(*args, **kwargs)
        given = list(tensors_in((args, tuple(kwargs.values()))))
        read = set(map(storage_of, given))
        args, kwargs = mapped(args, self._own), mapped(kwargs, self._own)
        if name == "__setitem__" or any(output is tensor for tensor in given):
            if name not in _MAY_DO_NOTHING:
                target = args[0] if output is None else output
                self._note(partial(func, *args, **kwargs), read, [target])
            return output
        made = [tensor.detach() for tensor in tensors_in(output) if storage_of(tensor) not in read]
        if not made:
            return output  # a view, or no tensor at all
        self._made.update({storage_of(tensor): tensor for tensor in made})
        places = getattr(func, "writes", ())
        written = [*made, *(args[place] for place in places if isinstance(args[place], Tensor))]
        is_single = isinstance(output, Tensor)
        if is_single and (call := self._into(made[0], func, args, kwargs)) is not None:
            self._note(call, read, written)
        elif is_single or len(made) == len(output) == sum(isinstance(x, Tensor) for x in output):
            copied = dict(enumerate(made))
            self._note(partial(func, *args, **kwargs), read, written, copied, is_single)
        else:
            raise UnsupportedUseError(f"{name}() returns more than new tensors: it cannot be recorded")
        return output

    def _own(self, tensor: Tensor) -> Tensor:
        """Return a tensor that was made as one of the tape's own, so that it shows who else holds it."""
        return tensor.detach() if storage_of(tensor) in self._made else tensor

    def calls(self, result: Tensor) -> list[Call]:
        """Return what repeats the calls that `result`, and what was there before, depend on."""
        return shortest(self._notes, self._made, result)

    def _note(
        self,
        call: partial[Any],
        read: set[int],
        written: list[Tensor],
        copied: dict[int, Tensor] | None = None,
        is_single: bool = False,
    ) -> None:
        self._notes.append(Note(call, read, set(map(storage_of, written)), copied or {}, is_single))

    def _into(self, output: Tensor, func: Any, args: Any, kwargs: Any) -> partial[Any] | None:
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


def _ways(func: Any) -> Iterator[Callable[..., partial[Any]]]:
    """Yield how a function may be called so that it writes its output into a tensor that is there."""
    name = func.__name__.strip("_")
    if name in _COPY:
        yield lambda out, args, kwargs: partial(Tensor.copy_, out, args[0])
    for function in (func, *(getattr(holder, name, None) for holder in _HOLDERS)):
        if function is not None:
            yield lambda out, args, kwargs, f=function: partial(f, *args, **kwargs, out=out)


def _call(way: Callable[..., partial[Any]], output: Tensor, args: Any, kwargs: Any) -> partial[Any] | None:
    try:
        return way(output, args, kwargs)
    except (TypeError, IndexError):
        return None


def _gives(output: Tensor, call: partial[Any] | None) -> bool:
    """Whether a call writes into `output` what stands there."""
    if call is None:
        return False
    expected = output.clone()
    try:
        output.copy_(expected == 0)  # another number everywhere
        call()
        return torch.equal(output, expected)
    except (TypeError, RuntimeError):  # it takes no `out`, or takes other arguments
        return False
    finally:
        output.copy_(expected)


def _depends_in_size(name: str, args: Any) -> bool:
    """Whether how much a function returns depends on numbers."""
    if name == "__getitem__":
        return any(tensor.dtype == torch.bool for tensor in tensors_in(args[1]))
    if name == "repeat_interleave":
        return any(isinstance(value, Tensor) for value in args[1:])
    return name in _SIZES or (name == "where" and len(args) == 1)
