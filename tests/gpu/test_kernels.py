"""Our kernels on a CUDA device, against the same arithmetic in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from penstock.ops.linear import FEW, linear
from penstock.ops.rotary import rotate, rotate_heads

pytestmark = pytest.mark.gpu


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", torch.bfloat16)


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal up to bf16's rounding of the result, and of the float32 sums before it."""
    torch.testing.assert_close(got.double(), wanted, rtol=2**-7, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("rows", range(1, FEW + 2))
@pytest.mark.parametrize(("size", "height"), [(4096, 6144), (1500, 77), (64, 1), (12288, 4096)])
@pytest.mark.parametrize("biased", [False, True])
@torch.inference_mode()
def test_few_rows(rows: int, size: int, height: int, biased: bool) -> None:
    x, weight = normal(rows, size), normal(height, size, seed=1)
    bias = normal(height, seed=2) if biased else None
    close(linear(x, weight, bias), F.linear(x.double(), weight.double(), None if bias is None else bias.double()))
    close(linear(x.unsqueeze(1), weight), F.linear(x.unsqueeze(1).double(), weight.double()))


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (14, 2, 64), (3, 1, 80), (9, 9, 256)])
@pytest.mark.parametrize("tokens", [(1,), (300,), (2, 5)])
@pytest.mark.parametrize("normed", [False, True])
@torch.inference_mode()
def test_rotated_heads(heads: int, kv_heads: int, head_dim: int, tokens: tuple[int, ...], normed: bool) -> None:
    query, key, _ = normal(*tokens, heads + 2 * kv_heads, head_dim).split((heads, kv_heads, kv_heads), -2)
    angles = torch.linspace(0, 7, tokens[-1] * head_dim // 2, device="cuda").view(-1, 1, head_dim // 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    scales = (normal(head_dim, seed=3), normal(head_dim, seed=4)) if normed else None
    found = rotate_heads(query, key, cos, sin, scales, 1e-6)
    for each, got, scale in zip((query, key), found, scales or (None, None), strict=True):
        exact = each.double()
        if scale is not None:
            exact = F.rms_norm(exact, scale.shape, scale.double(), 1e-6)
        close(got, rotate(exact, cos.double(), sin.double()))
        assert got.is_contiguous()
