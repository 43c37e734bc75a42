"""Products of a few rows with a large matrix, as decoding makes them."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library, register_fake

from penstock.core.processor import WORTH, calls_a_second
from penstock.ops import invariant, native

#: Up to so many rows, the product takes as long as reading the matrix, and our kernel reads it.
FEW = 4

#: On CPUs, by dtype: up to so many rows our kernel takes no longer than libraries do, which lay a matrix out anew
#: before they multiply, and far less where the matrix is in no cache. Vectors of half the width are for half the rows;
#: in bf16, libraries have instructions for many. In float32, see also :func:`outruns_libraries`.
FEW_ON_CPUS = {
    torch.float32: 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32,
    torch.bfloat16: 4,
}
#: Numbers of a matrix from which on that is more than what it takes to wake threads.
LARGE = 1 << 18

_library = Library("penstock", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")  # type: ignore[no-untyped-call]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` [*N, K] times the transpose of ``weight`` [M, K], plus ``bias`` [M]: [*N, M].

    Where no gradient is wanted, a few rows go through kernels of our own. On CUDA, in bf16 or fp16, libraries choose
    tiles for matrix units, which then wait for the weights longer than it takes to read them; to torch.compile it is
    one operator, so that a pass compiled for any number of rows can choose at each call. On CPUs, see
    :data:`FEW_ON_CPUS`. Sums are float32.
    """
    if torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        out: Tensor = torch.ops.penstock.linear(x, weight, bias)
        return out
    if x.device.type == "cpu" and _is_read(x, weight, bias):
        return invariant.invariant_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _is_read(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether, on a CPU, the kernel that reads a matrix once is for these."""
    few = FEW_ON_CPUS.get(x.dtype, 0)
    if not few or not x.numel() or weight.numel() < LARGE:
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    alike = weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)
    # Shards are not in memory as they look.
    plain = type(x) is Tensor and type(weight) in (Tensor, torch.nn.Parameter) and weight.is_contiguous()
    if not (alike and plain and native.serves(invariant.SOURCE)):
        return False
    return x.numel() <= few * x.shape[-1] or (x.dtype == torch.float32 and outruns_libraries())


@functools.cache
def outruns_libraries() -> bool:
    """Whether, on this processor, our kernel is the faster one at any number of rows: not all libraries give each
    maker's processors the widest vectors that they have. Both are timed, once a process, in about 40 ms."""
    x, weight = torch.ones(256, 512), torch.ones(512, 512)
    ours, theirs = (
        calls_a_second(functools.partial(product, x, weight)) for product in (invariant.invariant_linear, F.linear)
    )
    return ours >= WORTH * theirs


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dim() != 2 or not 0 < x.shape[0] <= FEW or not weight.is_contiguous():
        return F.linear(x, weight, bias)
    from penstock.ops.linear_kernel import few_rows

    return few_rows(x.contiguous(), weight, bias)


def _shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_library.impl("linear", _linear, "CUDA")  # type: ignore[no-untyped-call]
register_fake("penstock::linear", _shape, lib=_library)
