"""Operations on rows whose bits, for each row, do not depend on how many other rows there are, or what they hold.

A library takes another kernel, and so another order of sums, for another number of rows; and on CPUs what is left over
at the end of a thread's share of the numbers goes through other instructions than the rest. Here, sums are taken in an
order that is the same for every row. On CPUs (float32, float64, bfloat16) the operations are native code, compiled on
first use; on CUDA devices they are Triton kernels with tiles of fixed size. None has a gradient.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library, register_fake

from penstock.ops import native

SOURCE = Path(__file__).with_name("invariant_kernel.cpp")

_library = Library("penstock", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema in (
    "invariant_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? ends) -> Tensor",
    "invariant_norm(Tensor x, Tensor weight, float eps) -> Tensor",
):
    _library.define(_schema)  # type: ignore[no-untyped-call]


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` [*N, K] times the transpose of ``weight`` [M, K], plus ``bias`` [M]: [*N, M]. Sums are float32, or float64
    for float64."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out: Tensor = torch.ops.penstock.invariant_linear(rows, weight.contiguous(), bias, None)
    return out.view(*x.shape[:-1], weight.shape[0])


def invariant_grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of group g times ``weight[g]`` transposed, as of :func:`~penstock.ops.grouped.grouped_linear`."""
    out: Tensor = torch.ops.penstock.invariant_linear(x.contiguous(), weight.contiguous(), None, ends)
    return out


def invariant_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x`` [*N, K] over its root mean square, times ``weight`` [K]."""
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = torch.ops.penstock.invariant_norm(rows, weight.contiguous(), eps)
    return out.view(x.shape)


def invariant_swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, of the halves of ``gate_up`` [*N, 2 K]: [*N, K]."""
    gate, up = gate_up.chunk(2, -1)
    if gate_up.is_cuda:
        return F.silu(gate) * up
    gate_up, out = gate_up.contiguous(), torch.empty(gate.shape, dtype=gate.dtype)
    width = gate.shape[-1]
    _native("gated", gate.dtype)(gate_up.data_ptr(), out.data_ptr(), out.numel() // width, width, _threads())
    return out


def invariant_turns(angles: Tensor) -> tuple[Tensor, Tensor]:
    """The cosines and sines of float32 ``angles``."""
    if angles.is_cuda:
        return angles.cos(), angles.sin()
    angles = angles.contiguous()
    cos, sin = torch.empty_like(angles), torch.empty_like(angles)
    _native("turns")(angles.data_ptr(), cos.data_ptr(), sin.data_ptr(), angles.numel())
    return cos, sin


def in_pieces(function: Callable[..., tuple[Tensor, ...]], *rows: Tensor, size: int = 64) -> tuple[Tensor, ...]:
    """What ``function`` gives for some ``rows`` [N, ...], called with ``size`` of them at a time, the last ones filled
    up with zeros: however many rows there are, it sees tensors of one shape. For what libraries compute row by row.

    With pieces of 64 rows all numbers of elementwise operations are in whole vectors on CPUs, as long as a piece has
    less than 2**15 numbers, beyond which threads share it; with pieces of one row only the number of threads may
    matter.
    """
    count = len(rows[0])
    padded = (torch.cat([x, x.new_zeros(-count % size, *x.shape[1:])]) for x in rows)
    full = [torch.split(x, size) for x in padded]
    done = [function(*pieces) for pieces in zip(*full, strict=True)]
    return tuple(torch.cat(parts)[:count] for parts in zip(*done, strict=True))


def linear_on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor | None) -> Tensor:
    """The operator ``penstock::invariant_linear``, by native calls."""
    out, product = torch.empty(x.shape[0], weight.shape[-2], dtype=x.dtype), _native("product", x.dtype)
    size, height = x.shape[1], weight.shape[-2]
    stops = [x.shape[0]] if ends is None else ends.tolist()
    for start, stop, matrix in zip([0, *stops], stops, weight.view(-1, height, size), strict=False):
        if start < stop:
            places = (x[start:stop].data_ptr(), matrix.data_ptr(), None if bias is None else bias.data_ptr())
            product(*places, out[start:stop].data_ptr(), stop - start, size, height, _threads())
    return out


def norm_on_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The operator ``penstock::invariant_norm``, by a native call."""
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    norm = _native("norm", x.dtype)
    norm(x.data_ptr(), x.stride(0), weight.data_ptr(), out.data_ptr(), *x.shape, eps, _threads())
    return out


def _linear_cuda(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor | None) -> Tensor:
    from penstock.ops.invariant_kernel import product

    return product(x, weight, bias, ends)


def _norm_cuda(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from penstock.ops.invariant_kernel import norm

    return norm(x if x.stride(1) == 1 else x.contiguous(), weight, eps)


_library.impl("invariant_linear", linear_on_cpu, "CPU")  # type: ignore[no-untyped-call]
_library.impl("invariant_linear", _linear_cuda, "CUDA")  # type: ignore[no-untyped-call]
_library.impl("invariant_norm", norm_on_cpu, "CPU")  # type: ignore[no-untyped-call]
_library.impl("invariant_norm", _norm_cuda, "CUDA")  # type: ignore[no-untyped-call]


def _linear_shape(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[-2])


def _norm_shape(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


register_fake("penstock::invariant_linear", _linear_shape, lib=_library)
register_fake("penstock::invariant_norm", _norm_shape, lib=_library)


@functools.cache
def _native(name: str, dtype: torch.dtype | None = None) -> native.Function:
    """The native function; pointers and sizes are given as they are."""
    kinds = {"product": "ppppllll", "norm": "plpplldl", "gated": "pplll", "turns": "pppl"}[name]
    of = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "d": ctypes.c_double}
    whole = name if dtype is None else f"{name}_{dtype}".replace("torch.", "")
    return native.Function(native.load(SOURCE), whole, [of[kind] for kind in kinds])


def _threads() -> int:
    return torch.get_num_threads()
