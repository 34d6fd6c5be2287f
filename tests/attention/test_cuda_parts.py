"""Fused kernels on CUDA: like plain operations where there is a GPU, refused where there is none."""

import pytest
import torch

from everlong.attention.cuda_parts import _aligned, fused
from everlong.attention.parts import Part, Triangle, attend

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: these kernels are untested here"
)


def tensors(dtype, n, m, device):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, heads, length, 64, generator=generator).to(device, dtype)
        for heads, length in ((6, n), (2, m), (2, m))
    ]


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n, m", [(1, 300), (70, 70), (33, 257)])
def test_parts_on_a_gpu_merge_to_what_they_are_on_the_cpu(dtype, n, m):
    q, k, v = tensors(dtype, n, m, "cpu")
    visible = torch.rand(2, 1, n, m, generator=torch.Generator().manual_seed(1)) < 0.6
    visible[..., 0] = True
    whole = tensors(dtype, n, n, "cpu")[1:]
    parts = [Part(q, k, v, visible), Part(q, *whole, Triangle.LOWER), Part(q, 0.5 * k, v)]
    expected = attend(
        [Part(*(x.float() for x in (p.queries, p.keys, p.values)), p.visible) for p in parts], scaling=0.1
    )
    on_gpu = [
        Part(
            *(x.cuda() for x in (p.queries, p.keys, p.values)),
            p.visible.cuda() if p.visible is visible else p.visible,
        )
        for p in parts
    ]
    tolerance = 2e-3 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(
        attend(on_gpu, scaling=0.1).cpu().float(), expected, atol=tolerance, rtol=tolerance
    )


def test_a_kernel_that_is_not_there_is_not_used():
    q, k, v = tensors(torch.float32, 5, 9, "cpu")
    bias = torch.zeros(1, 1, 5, 9)
    assert fused(q, k, v, bias, is_causal=False, scaling=0.1) is None
    assert fused(q.double(), k.double(), v.double(), None, is_causal=False, scaling=0.1) is None


def test_a_bias_is_laid_out_in_aligned_rows():
    bias = torch.randn(2, 3, 4, 21)
    laid_out = _aligned(bias)
    assert torch.equal(laid_out, bias) and laid_out.stride(-2) == 32
