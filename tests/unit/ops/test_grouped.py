"""The grouped matrix product against one product a row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from penstock.core.randomness import torch_generator
from penstock.ops.grouped import fused_serves, grouped_linear

SIZES = st.lists(st.integers(0, 5), min_size=1, max_size=6)


def problem(sizes: list[int], inner: int = 4, outer: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of groups of the given sizes, a matrix for each group, and where the groups end."""
    draw = torch_generator(0, "grouped", *sizes)
    x = torch.randn(sum(sizes), inner, generator=draw, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(sizes), outer, inner, generator=draw, dtype=torch.float64, requires_grad=True)
    return x, weight, torch.tensor(sizes).cumsum(0).to(torch.int32)


def row_by_row(x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
    group = torch.repeat_interleave(torch.arange(len(sizes), device=x.device), torch.tensor(sizes, device=x.device))
    return torch.einsum("ni,noi->no", x, weight[group])


@given(SIZES)
def test_equals_a_product_for_each_row(sizes: list[int]):
    """Output and gradients, with empty groups, and with nothing but empty groups."""
    x, weight, ends = problem(sizes)
    outputs = (grouped_linear(x, weight, ends), row_by_row(x, weight, sizes))
    ours, theirs = ([out, *torch.autograd.grad(out.sin().sum(), (x, weight))] for out in outputs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", [[3, 0, 2], [0, 4], [1]])
def test_gradients_equal_differences(sizes: list[int]):
    x, weight, ends = problem(sizes)
    assert torch.autograd.gradcheck(lambda a, b: grouped_linear(a, b, ends), (x, weight))


def test_the_operators_describe_themselves_to_the_compiler():
    """Fake tensors, autograd and tracing agree with the real thing, for sizes that are not known in advance too."""
    x, weight, ends = problem([2, 0, 3])
    opcheck(torch.ops.penstock.grouped_product.default, (x, weight, ends))
    grad = torch.randn(5, 3, dtype=torch.float64)
    checks = ("test_schema", "test_faketensor")
    opcheck(torch.ops.penstock.grouped_outer.default, (grad, x.detach(), ends), test_utils=checks)


def test_bf16_rounds_only_products():
    sizes = [40, 0, 25, 7]
    x, weight, ends = problem(sizes, inner=64, outer=32)
    exact = row_by_row(x, weight, sizes)
    ours = grouped_linear(x.bfloat16(), weight.bfloat16(), ends)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=0.02 * exact.abs().max().item())


@pytest.mark.parametrize(("rows", "columns"), [(32, 64), (8, 8), (6, 64), (32, 10)])
def test_the_fused_product_is_asked_for_whole_16_bytes_alone(rows, columns):
    assert fused_serves(rows, columns) == (2 * rows % 16 == 2 * columns % 16 == 0)


@pytest.mark.gpu
@pytest.mark.parametrize(("inner", "outer"), [(64, 32), (64, 6), (10, 32)])
def test_the_fused_product_equals_a_product_for_each_row(inner, outer):
    sizes = [64, 0, 40, 24]
    x, weight, ends = problem(sizes, inner=inner, outer=outer)
    results = []
    for dtype, device in ((torch.bfloat16, "cuda"), (torch.float64, "cpu")):
        rows, matrices = (v.detach().to(device, dtype).requires_grad_() for v in (x, weight))
        out = grouped_linear(rows, matrices, ends.to(device))
        results.append([out, *torch.autograd.grad(out.square().sum(), (rows, matrices))])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.cpu().double(), exact, rtol=0, atol=0.02 * exact.abs().max().item())
