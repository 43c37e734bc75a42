"""Products of a few rows with a large matrix, as decoding makes them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library, register_fake

#: Up to so many rows, the product takes as long as reading the matrix, and our kernel reads it.
FEW = 4

_library = Library("penstock", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")  # type: ignore[no-untyped-call]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` [*N, K] times the transpose of ``weight`` [M, K], plus ``bias`` [M]: [*N, M].

    Where no gradient is wanted, on CUDA, in bf16 or fp16, a few rows go through a kernel of our own: libraries choose
    tiles for matrix units, which then wait for the weights longer than it takes to read them. Sums are float32. To
    torch.compile it is one operator, so that a pass compiled for any number of rows can choose at each call.
    """
    if torch.is_grad_enabled() or not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16):
        return F.linear(x, weight, bias)
    out: Tensor = torch.ops.penstock.linear(x, weight, bias)
    return out


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dim() != 2 or not 0 < x.shape[0] <= FEW or not weight.is_contiguous():
        return F.linear(x, weight, bias)
    from penstock.ops.linear_kernel import few_rows

    return few_rows(x.contiguous(), weight, bias)


def _shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_library.impl("linear", _linear, "CUDA")  # type: ignore[no-untyped-call]
register_fake("penstock::linear", _shape, lib=_library)
