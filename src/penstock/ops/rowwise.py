"""What is done to each row alone between products, natively on CPUs.

For the few rows of a step that decodes, an operator of PyTorch costs more than its work, and a norm is made of several,
a rotation of many. Here a norm is one call, and so is the rotation of all heads with the norms before it. A sum is for
calls that are recorded, see :mod:`penstock.ops.calls`.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from penstock.ops import native

SOURCE = Path(__file__).with_name("rowwise_kernel.cpp")

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class _Heads(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "scale", "out")),
        *((name, ctypes.c_int64) for name in ("heads", "token", "head")),
    )


def serves(x: Tensor) -> bool:
    """Whether rows like ``x`` [*, size] are computed here: on a CPU with a compiler, where no gradient is wanted."""
    there = not x.is_cuda and x.device.type == "cpu" and x.dtype in NAMES and x.stride(-1) == 1
    return there and not torch.is_grad_enabled() and not torch.compiler.is_compiling() and native.serves(SOURCE)


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """``x`` [*, size] normed by root-mean-square over its last dimension, and multiplied by ``scale`` [size]."""
    x, scale = x.contiguous(), scale.contiguous()
    out, size = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // size
    _function("rms_norm", x.dtype)(
        x.data_ptr(), scale.data_ptr(), eps, out.data_ptr(), rows, size, torch.get_num_threads()
    )
    return out


def rotate_heads(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, scales: tuple[Tensor, Tensor] | None, eps: float
) -> tuple[Tensor, Tensor]:
    """As :func:`penstock.ops.rotary.rotate_heads`, of ``query`` [N, H, D] and ``key`` [N, K, D], with ``cos`` and
    ``sin`` [N, 1, D / 2] and ``scales`` [D] each, all of one dtype."""
    cos, sin = cos.contiguous(), sin.contiguous()
    kept = (None, None) if scales is None else [scale.contiguous() for scale in scales]
    given, out = (query, key), (torch.empty(query.shape, dtype=query.dtype), torch.empty(key.shape, dtype=key.dtype))
    described = [
        _Heads(x.data_ptr(), None if scale is None else scale.data_ptr(), to.data_ptr(), x.shape[1], *x.stride()[:2])
        for x, scale, to in zip(given, kept, out, strict=True)
    ]
    rows, _, dim = query.shape
    native.keep(*described)
    _function("rotate_heads", query.dtype)(
        *map(ctypes.addressof, described), cos.data_ptr(), sin.data_ptr(), eps, rows, dim, torch.get_num_threads()
    )
    return out


def add(a: Tensor, b: Tensor) -> Tensor:
    """The sum of contiguous tensors of one shape and dtype, as PyTorch rounds it."""
    out = torch.empty_like(a)
    _function("add", a.dtype)(a.data_ptr(), b.data_ptr(), out.data_ptr(), a.numel())
    return out


@functools.cache
def _function(name: str, dtype: torch.dtype) -> native.Function:
    place, number = ctypes.c_void_p, ctypes.c_int64
    types = {
        "rms_norm": [place, place, ctypes.c_double, place, number, number, number],
        "rotate_heads": [place, place, place, place, ctypes.c_double, number, number, number],
        "add": [place, place, place, number],
    }[name]
    return native.Function(native.load(SOURCE), f"{name}_{NAMES[dtype]}", types)
