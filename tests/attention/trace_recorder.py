"""Records a step as a device does, on the CPU: the operations, on the very tensors they were done on.

What Python decided while recording is baked in, as in a CUDA graph: numbers, shapes, which operation comes
next. What a capture refuses, because Python would need to see a tensor, or a number comes from Python's
memory, is refused here too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from everlong.attention.call_tape import CallTapes
from everlong.kernels import loading

REFUSED = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "lift_fresh", "masked_select"}


class TraceRecorder:
    """Counts what it records and repeats."""

    eager_steps = 4
    follows_tensors = False
    grows = False

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def run(self, run: Callable[[], Tensor]) -> Tensor:
        return run()

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        with Trace() as trace:
            result = run()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            trace.replay()

        return replay, result


class CountedTapes(CallTapes):
    """What records on a CPU, counted, and recording as soon as the other does."""

    eager_steps = TraceRecorder.eager_steps

    def __init__(self) -> None:
        super().__init__()
        self.recorded = 0
        self.replayed = 0

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        replay, result = super().record(run)
        self.recorded += 1

        def counted() -> None:
            self.replayed += 1
            replay()

        return counted, result


class PlainTapes(CountedTapes):
    """The same where there are no compiled kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.follows_tensors = True
        self.grows = False

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        def without_kernels() -> Tensor:
            token = loading._records.set(False)
            try:
                return run()
            finally:
                loading._records.reset(token)

        return super().record(without_kernels)


RECORDERS = {"a device's": TraceRecorder, "a CPU's": CountedTapes, "a CPU's without kernels": PlainTapes}


class Trace(TorchDispatchMode):
    """What is done while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.split("::")[1] in REFUSED:
            raise RuntimeError(f"{func} cannot be captured")
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        given = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x for x in tree_leaves(output) if isinstance(x, Tensor) and _storage(x) not in given]
        if made or func._schema.is_mutable:  # a view of what was given stays one
            self._calls.append((func, args, kwargs, made))
        return output

    def replay(self) -> None:
        for func, args, kwargs, made in self._calls:
            output = func(*args, **kwargs)
            if made:
                given = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
                again = [x for x in tree_leaves(output) if isinstance(x, Tensor) and _storage(x) not in given]
                for into, fresh in zip(made, again, strict=True):
                    into.copy_(fresh)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
