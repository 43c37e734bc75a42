"""What is done to each row alone: native norms and rotations are those of PyTorch in float64, up to rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from penstock.ops import native, rowwise
from penstock.ops.norms import rms_norm
from penstock.ops.rotary import rotate, rotate_heads

pytestmark = pytest.mark.skipif(not native.serves(rowwise.SOURCE), reason="there is no compiler")

#: One rounding to the dtype, and sums in float32.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-8}
EPS = 1e-5


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    scale = wanted.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    assert ((found.double() - wanted).abs() / scale).max() <= TOLERANCE[found.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 256), (3, 13), (2, 5, 40), (900, 96), (1, 1)])
def test_norms(dtype, shape):
    draw = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(shape, generator=draw)).to(dtype)
    scale = torch.randn(shape[-1], generator=draw).to(dtype)
    with torch.no_grad():
        found = rms_norm(x, scale, EPS)
    assert found.shape == x.shape
    close(found, F.rms_norm(x.double(), scale.shape, scale.double(), EPS))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dim", [6, 64, 128])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 130])
def test_rotations(dtype, dim, normed, tokens):
    draw = torch.Generator().manual_seed(0)
    heads = torch.randn(tokens, 8, dim, generator=draw).to(dtype)
    query, key, _ = heads.split((5, 2, 1), 1)  # parts of one product, as attention has them
    angles = 9 * torch.rand(tokens, 1, dim // 2, generator=draw)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    scales = tuple(torch.randn(2, dim, generator=draw).to(dtype)) if normed else None
    with torch.no_grad():
        found = rotate_heads(query, key, cos, sin, scales, EPS)
    for x, own, scale in zip((query, key), found, scales or (None, None), strict=True):
        wide = x.double() if scale is None else F.rms_norm(x.double(), (dim,), scale.double(), EPS)
        close(own, rotate(wide, cos.double(), sin.double()))
        assert own.is_contiguous()


def test_a_rows_bits_do_not_depend_on_the_others_nor_on_threads():
    x, scale = torch.randn(600, 128), torch.randn(128)
    with torch.no_grad():
        whole = rms_norm(x, scale, EPS)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            assert torch.equal(rms_norm(x, scale, EPS), whole)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(torch.cat([rms_norm(x[:1], scale, EPS), rms_norm(x[1:], scale, EPS)]), whole)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_what_is_no_number_stays_none_and_the_largest_numbers_stay_finite(dtype):
    x = torch.tensor([[1.0, float("nan"), 2.0], [1e19, -1e19, 0.0], [0.0, 0.0, 0.0]]).to(dtype)
    with torch.no_grad():
        found = rms_norm(x, torch.ones(3, dtype=dtype), EPS)
    assert found[0].isnan().all()
    assert torch.equal(found.isinf(), F.rms_norm(x, (3,), None, EPS).isinf())
    assert not found[2].any()


def test_gradients_and_other_dtypes_are_left_to_pytorch():
    x = torch.randn(2, 8, requires_grad=True)
    rms_norm(x, torch.ones(8), EPS).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert not rowwise.serves(torch.zeros(2, 8, dtype=torch.float64))
        assert not rowwise.serves(torch.zeros(8, 2).T)
        assert rowwise.serves(torch.zeros(2, 8))
