"""How a tier keeps numbers: what that takes is known without doing it."""

from __future__ import annotations

import pytest
import torch

from everlong.attention.coding import coded, coded_bytes


@pytest.mark.parametrize("precision", ["exact", "float16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_what_is_kept(precision, dtype):
    keys, values = torch.randn(2, 3, 5, 8, dtype=dtype), torch.randn(2, 3, 5, 12, dtype=dtype)
    kept = coded(keys, values, precision)
    assert coded_bytes(keys[:, :, :1], values[:, :, :1], 5, precision) == sum(x.nbytes for x in kept)
