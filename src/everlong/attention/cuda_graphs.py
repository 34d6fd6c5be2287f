"""CUDA graphs: the kernels of a step, launched all at once.

Written without a GPU at hand: see the limits in the documentation. What is recorded is held against an eager
step before it is used, so that a device on which this does not work costs one attempt and a warning.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

_WARM_UP = 3  # runs before the capture, during which libraries may still allocate and choose
_one_at_a_time = threading.Lock()  # captures share a stream


class CudaGraphs:
    """Records steps as CUDA graphs.

    Parameters
    ----------
    device : torch.device
        A CUDA device.
    """

    eager_steps = 4
    follows_tensors = False
    grows = False

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def run(self, run: Callable[[], Tensor]) -> Tensor:
        """Run something as it would be recorded: as it is."""
        return run()

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Warm `run` up on a stream of its own, and capture it; see :class:`Recorder`."""
        with _one_at_a_time, torch.cuda.device(self._device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    run()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on with what a capture forbids to its own.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                result = run()

        def replay() -> None:
            with torch.cuda.device(self._device):
                graph.replay()

        return replay, result


def has_graphs() -> bool:
    """Whether this PyTorch and this machine have CUDA graphs."""
    return torch.cuda.is_available() and hasattr(torch.cuda, "CUDAGraph")
