"""A matrix product for each group of rows: the arithmetic of a mixture of experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

#: Numbers of bf16 in 16 bytes.
WHOLE = 8


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of group g times ``weight[g]`` transposed.

    Args:
        x: [N, in], rows sorted by group.
        weight: [groups, out, in].
        ends: int32 [groups], where each group ends; the last is N.

    Returns:
        [N, out].
    """
    if x.device.type == "cuda" and x.dtype == torch.bfloat16 and fused_serves(*weight.shape[1:]):
        fused: Tensor = F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
        return fused
    looped: Tensor = _product(x, weight, ends)
    return looped


def fused_serves(rows: int, columns: int) -> bool:
    """Whether PyTorch's grouped product takes matrices [rows, columns] of bf16: it wants whole 16 bytes, with its
    gradients in both directions."""
    return rows % WHOLE == 0 and columns % WHOLE == 0


def _groups(ends: Tensor) -> list[slice]:
    stops = ends.tolist()
    return [slice(a, b) for a, b in zip([0, *stops], stops, strict=False)]


# One opaque operator, so that the loop over data-dependent slices does not break a compiled graph.
@custom_op("penstock::grouped_product", mutates_args=())
def _product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[1])
    for matrix, rows in zip(weight, _groups(ends), strict=True):
        torch.mm(x[rows], matrix.T, out=out[rows])
    return out


@custom_op("penstock::grouped_outer", mutates_args=())
def _outer(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Gradient of the weights: for each group, grad [n, out] transposed times x [n, in]."""
    return torch.stack([grad[rows].T @ x[rows] for rows in _groups(ends)])


@_product.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_outer.register_fake
def _(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return grad.new_empty(ends.shape[0], grad.shape[1], x.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, ends = ctx.saved_tensors
    grad = grad.contiguous()
    return _product(grad, weight.transpose(1, 2), ends), _outer(grad, x, ends), None


_product.register_autograd(_backward, setup_context=_save)
