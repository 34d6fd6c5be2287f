"""Copies of a weight matrix in fewer bits, each with the kernel that multiplies with it on the CPU.

The kernels of 8 and 4 bits take bfloat16 activations and give bfloat16 back; that of 16 multiplies in
float32.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

_GROUP = 32  # weights that share a scale and a zero in 4 bits
_ROWS = 16  # the 4-bit kernel takes output channels by this many
_COLUMNS = 16  # and the 8-bit kernel inputs
_TINY = 1e-12


class Packed(ABC):
    """A copy of one or more weights of shape (out, in), one below the other: each its own out."""

    @abstractmethod
    def __init__(self, *weights: Tensor) -> None: ...

    takes: ClassVar[torch.dtype]
    """What :meth:`multiply` takes."""

    @abstractmethod
    def multiply(self, rows: Tensor) -> Tensor:
        """Return the product with `rows`, shape (n, in), as (n, out), both in the dtype that it takes."""

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the product with `rows`, shape (n, in), as (n, out) in the rows' dtype."""
        return self.multiply(rows.to(self.takes)).to(rows.dtype)

    @abstractmethod
    def restored(self) -> Tensor:
        """Return the weight that is multiplied with, float32, shape (out, in)."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held."""

    @staticmethod
    @abstractmethod
    def bytes_for(weight: Tensor) -> int:
        """Bytes a copy of `weight` would hold."""

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Whether the kernel takes this shape."""
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Packed:
        return self  # never changed


class Half(Packed):
    """float16, multiplied in float32."""

    takes = torch.float32

    def __init__(self, *weights: Tensor) -> None:
        weight = _joined(weights)
        self._shape = weight.shape
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)

    def multiply(self, rows: Tensor) -> Tensor:
        """Multiply."""
        product: Tensor = torch.ops.quantized.linear_dynamic_fp16(rows, self._packed)
        return product

    def restored(self) -> Tensor:
        """Return the weight in float16's precision."""
        weight: Tensor = torch.ops.quantized.linear_unpack_fp16(self._packed)[0]
        return weight.float()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 2 * self._shape.numel()

    @staticmethod
    def bytes_for(weight: Tensor) -> int:
        """Bytes a copy of `weight` would hold."""
        return 2 * weight.numel()


class Int8(Packed):
    """Whole numbers from -127 to 127, and a bfloat16 scale for each output channel."""

    takes = torch.bfloat16

    def __init__(self, *weights: Tensor) -> None:
        size = sum(len(weight) for weight in weights), weights[0].shape[1]
        self._numbers = torch.empty(size, dtype=torch.int8)
        self._scales = torch.empty(size[0], dtype=torch.bfloat16)
        rows = [len(weight) for weight in weights]
        for weight, numbers, scales in zip(
            weights, torch.split(self._numbers, rows), torch.split(self._scales, rows), strict=True
        ):
            weight = weight.float()
            largest = torch.maximum(weight.amax(1), -weight.amin(1)).clamp_(min=_TINY)
            scales.copy_(largest / 127)  # rounded first: the numbers are found for what it becomes
            numbers.copy_((weight / scales.float()[:, None]).round_().clamp_(-127, 127))

    def multiply(self, rows: Tensor) -> Tensor:
        """Multiply."""
        product: Tensor = torch._weight_int8pack_mm(rows, self._numbers, self._scales)
        return product

    def restored(self) -> Tensor:
        """Return numbers times scales."""
        return self._numbers.float() * self._scales.float()[:, None]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._numbers.nbytes + self._scales.nbytes

    @staticmethod
    def bytes_for(weight: Tensor) -> int:
        """Bytes a copy of `weight` would hold."""
        return weight.numel() + 2 * len(weight)

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Whether the kernel takes this shape: it reads beyond the ends of others."""
        return weight.shape[1] % _COLUMNS == 0


class Int4(Packed):
    """Whole numbers from 0 to 15, and a bfloat16 scale and zero for each 32 weights of a row.

    The scale spans a group from its least to its greatest weight, as GGUF's Q4_1 does: weights that came from
    there get their own 4-bit values again, only scale and zero are rounded.
    """

    takes = torch.bfloat16

    def __init__(self, *weights: Tensor) -> None:
        rows = [len(weight) for weight in weights]
        numbers = torch.empty(sum(rows), weights[0].shape[1], dtype=torch.int32)
        self._shape = numbers.shape
        parts = [
            _in_four_bits(weight, part)
            for weight, part in zip(weights, torch.split(numbers, rows), strict=True)
        ]
        scales, zeros = (torch.cat(found) for found in zip(*parts, strict=True))
        self._scales_and_zeros = torch.stack((scales.T, zeros.T), -1).bfloat16().contiguous()
        self._packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)

    def multiply(self, rows: Tensor) -> Tensor:
        """Multiply."""
        product: Tensor = torch._weight_int4pack_mm_for_cpu(
            rows, self._packed, _GROUP, self._scales_and_zeros
        )
        return product

    def restored(self) -> Tensor:
        """Return the weight, by multiplying with ones one at a time."""
        return self(torch.eye(self._shape[1])).T.contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._packed.nbytes + self._scales_and_zeros.nbytes

    @staticmethod
    def bytes_for(weight: Tensor) -> int:
        """Bytes a copy of `weight` would hold."""
        return weight.numel() // 2 + 4 * weight.numel() // _GROUP

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Whether the kernel takes this shape."""
        return weight.shape[0] % _ROWS == 0 and weight.shape[1] % _GROUP == 0

    @staticmethod
    def loss(weight: Tensor) -> float:
        """Largest error of the 4-bit values, before scales are rounded, as a fraction of the group's span."""
        numbers = torch.empty(weight.shape, dtype=torch.int32)
        scales, zeros = _in_four_bits(weight, numbers)
        groups = weight.float().reshape(*scales.shape, _GROUP)
        back = (numbers.reshape(groups.shape) - 8) * scales[..., None] + zeros[..., None]
        return float(((back - groups).abs() / (15 * scales[..., None]).clamp(min=_TINY)).max())


def _joined(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat([*weights])


def _in_four_bits(weight: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Fill `numbers` (out, in) and return scales and zeros (out, groups).

    Then weight = (number - 8) * scale + zero.
    """
    groups = weight.float().reshape(len(weight), -1, _GROUP)
    least, greatest = groups.amin(-1), groups.amax(-1)  # aminmax() is three times as slow
    scales = (greatest - least) / 15
    found = (groups - least[..., None]).div_(scales[..., None].clamp(min=_TINY)).round_().clamp_(0, 15)
    numbers.copy_(found.reshape(weight.shape))
    return scales, least + 8 * scales


@functools.cache
def kernels_missing() -> str | None:
    """Say what this PyTorch lacks for packed weights; None: nothing."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return "this PyTorch was built without FBGEMM"
    generator = torch.Generator().manual_seed(0)
    weight, rows = (
        torch.randn(_ROWS, _GROUP, generator=generator),
        torch.randn(2, _GROUP, generator=generator),
    )
    for kind in (Half, Int8, Int4):
        try:
            packed = kind(weight)
            works = torch.allclose(packed(rows), rows @ packed.restored().T, atol=0.1)
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            return f"this PyTorch has no kernel for {kind.__name__} ({error})"
        if not works:
            return f"this PyTorch's kernel for {kind.__name__} gives wrong results here"
    return None
