"""What a machine can do at best, and what the kernels of one decode step take by themselves."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everlong.attention.parts import attend_all
from everlong.evaluation.speed import wait_for
from everlong.evaluation.work import Work
from everlong.kernels.calls import Scratch, attends
from everlong.kernels.calls import attend as kernel
from everlong.kernels.loading import compiled
from everlong.models.anatomy import decoder_of
from everlong.models.packing import PackedLinear

_SIDE = {"cpu": 2048}  # of the square matrices that are multiplied
_BUFFER = {"cpu": 2**29}  # bytes that are read: more than fits into caches
_OTHER_SIDE, _OTHER_BUFFER = 8192, 2**30
_PASSES = 3
_scratch = Scratch()


class Rooflines:
    """The rate of the matrix unit and that of the memory bus, measured with the threads that are in use.

    Parameters
    ----------
    device : torch.device
        Where.
    dtype : torch.dtype
        Of the matrices: the model's.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        side = _SIDE.get(device.type, _OTHER_SIDE)
        self._matrix = torch.full((side, side), 0.5, device=device, dtype=dtype)
        self._buffer = torch.ones(_BUFFER.get(device.type, _OTHER_BUFFER) // 4, device=device)

    @torch.inference_mode()
    def flops(self) -> float:
        """Multiply two square matrices once: floating-point operations per second."""
        return 2 * len(self._matrix) ** 3 / _seconds(lambda: self._matrix @ self._matrix)

    @torch.inference_mode()
    def bandwidth(self) -> float:
        """Read a buffer once, summing it up: bytes per second."""
        return self._buffer.nbytes / _seconds(self._buffer.sum)


@dataclass(frozen=True)
class Floor:
    """Seconds of the kernels that one decode step cannot do without, run by themselves.

    Attributes
    ----------
    products : float
        Every linear layer's product with one token.
    window : float
        Attention of one query to each layer's window, by the fastest of the ways tried.
    head : float
        The product of the output embeddings.
    """

    products: float
    window: float
    head: float

    @property
    def step(self) -> float:
        """Of the whole step."""
        return self.products + self.window + self.head


class KernelFloor:
    """Runs the kernels of a decode step alone: what the step would take if it did nothing else.

    Each weight is multiplied with as a step reads it, packed or float, layer after layer, so that it comes
    from where a step finds it: from memory, where it does not fit into caches. Layers that multiply together
    do so here. Windows are random keys and values of their own for each layer.

    Parameters
    ----------
    model : nn.Module
        The model, packed or not.
    work : Work
        What it does, see :func:`~everlong.evaluation.work.work_of`.
    held : int
        Tokens the full-attention layers hold.
    """

    def __init__(self, model: nn.Module, work: Work, held: int) -> None:
        inner: Any = model
        decoder: Any = decoder_of(model)
        embedding = decoder.get_input_embeddings().weight
        like: dict[str, Any] = {"device": embedding.device, "dtype": embedding.dtype}
        products: dict[object, tuple[Callable[[Tensor], Tensor], int]] = {}
        rows: list[Tensor] = []
        for layer in map(decoder.get_submodule, work.linear):
            key, product, nbytes = _product_of(layer)
            if key not in products:
                products[key] = product, nbytes
                rows.append(torch.randn(1, layer.in_features, **like))
        _, self._head, head_bytes = _product_of(inner.get_output_embeddings())
        self._row = torch.randn(1, inner.get_output_embeddings().in_features, **like)
        self._products = [(product, row) for (product, _), row in zip(products.values(), rows, strict=True)]
        self._windows = [
            (
                torch.randn(1, layer.heads, 1, layer.key_size, **like),
                torch.randn(1, layer.kv_heads, layer.held(held), layer.key_size, **like),
                torch.randn(1, layer.kv_heads, layer.held(held), layer.value_size, **like),
            )
            for layer in work.layers
        ]
        self._ways = [way for way in (_folded, _grouped, _ours, _compiled) if _works(way, self._windows[0])]
        self.weight_bytes = sum(nbytes for _, nbytes in products.values()) + head_bytes
        """Bytes of the weights a step reads, head included."""

    @torch.inference_mode()
    def measure(self) -> Floor:
        """Run all kernels a few times, in turn, and return the medians."""
        passes = {way: [self._one_pass(way) for _ in range(_PASSES)] for way in self._ways}
        every = [each for some in passes.values() for each in some]
        return Floor(
            products=median(each.products for each in every),
            window=min(median(each.window for each in some) for some in passes.values()),
            head=median(each.head for each in every),
        )

    def _one_pass(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Floor:
        return Floor(
            products=_seconds(lambda: [product(row) for product, row in self._products][-1]),
            window=_seconds(lambda: [attend(*window) for window in self._windows][-1]),
            head=_seconds(lambda: self._head(self._row)),
        )


def _product_of(layer: Any) -> tuple[object, Callable[[Tensor], Tensor], int]:
    """Return how a linear layer multiplies one token: what it is told by, the call, bytes of its weights."""
    if isinstance(layer, PackedLinear):
        packed = layer.__dict__["_everlong_product"][0].packed
        return packed, packed, packed.nbytes
    return layer, functools.partial(F.linear, weight=layer.weight, bias=layer.bias), layer.weight.nbytes


def _grouped(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend by a kernel that knows of grouped heads."""
    return F.scaled_dot_product_attention(queries, keys, values, enable_gqa=True)


def _folded(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend with the query heads of a group as queries of one head."""
    return F.scaled_dot_product_attention(queries.view(1, keys.shape[1], -1, keys.shape[-1]), keys, values)


def _ours(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend as a step of writing does."""
    return attend_all(queries, keys, values, scaling=keys.shape[-1] ** -0.5)


def _compiled(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend as a recorded step does on a CPU, where there are compiled kernels."""
    if compiled() is None or not attends(queries, keys, values):
        raise RuntimeError("no kernel of ours takes this")
    return kernel(queries, keys, values, _all_of(keys.shape[2]), keys.shape[-1] ** -0.5, _scratch)


@functools.cache
def _all_of(keys: int) -> Tensor:
    return torch.tensor([keys], device="cpu")


@torch.inference_mode()
def _works(attend: Callable[[Tensor, Tensor, Tensor], Tensor], window: tuple[Tensor, Tensor, Tensor]) -> bool:
    """Whether this device has a kernel for it."""
    try:
        attend(*window)
    except RuntimeError:
        return attend is _folded  # plain attention: an error there is one
    return True


def _seconds(run: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    wait_for(run())
    return time.perf_counter() - started
