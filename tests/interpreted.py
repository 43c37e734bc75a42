"""Triton's kernels without a GPU: by its interpreter, where TRITON_INTERPRET=1 says so.

What the interpreter gets wrong as of Triton 3.9 is put right while a test runs: it multiplies bfloat16 as if it were
integers, and rounds to bfloat16 and to e4m3 other than devices do. What is written in the device's own instructions, it
does not know, and is computed by others.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
floats = pytest.importorskip("penstock.ops.quantized.packed_kernel").floats

#: Where kernels run.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

#: Why they do not run here, or nothing.
OBSTACLE = (
    ""
    if DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    else ("needs a CUDA device, or TRITON_INTERPRET=1")
)

runs = pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE)


@pytest.fixture(autouse=True)
def repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies and rounds as devices do."""
    if DEVICE == "cuda":
        return
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    dot, convert, cast = builder.create_dot, builder.create_fp_to_fp, builder.cast_impl

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def rounded(handle: Any, dtype: torch.dtype, like: torch.dtype, name: Any) -> Any:
        found = torch.from_numpy(np.ascontiguousarray(handle.data)).to(dtype).view(like)
        return interpreter.TensorHandle(found.numpy(), name)

    def casting(self: Any, handle: Any, kind: Any) -> Any:
        if (handle.dtype.scalar, kind.scalar) == (tl.float32, tl.bfloat16):
            return rounded(handle, torch.bfloat16, torch.uint16, tl.bfloat16)
        return cast(self, handle, kind)

    def converting(self: Any, handle: Any, kind: Any, mode: Any) -> Any:
        if (handle.dtype.scalar, kind.scalar) == (tl.float32, tl.float8e4nv):
            return rounded(handle, torch.float8_e4m3fn, torch.uint8, tl.float8e4nv)
        return convert(self, handle, kind, mode)

    from penstock.ops.quantized import packed_kernel, plain_kernel

    for module in (packed_kernel, plain_kernel):
        for decoded in (four_integers, four_floats):
            monkeypatch.setattr(module, decoded.__name__, decoded)
    monkeypatch.setattr(builder, "create_dot", lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest))
    monkeypatch.setattr(builder, "cast_impl", casting)
    monkeypatch.setattr(builder, "create_fp_to_fp", converting)


@triton.jit
def _number(raw):
    """Integers in 4 bits that are stored with 8 added."""
    return ((raw & 15).to(tl.float32) - 8.0).to(tl.bfloat16)


@triton.jit
def four_integers(raw):
    """The four of them in each word."""
    return _number(raw), _number(raw >> 4), _number(raw >> 8), _number(raw >> 12)


@triton.jit
def four_floats(raw):
    """Four numbers of e2m1 in each word."""
    return floats(raw), floats(raw >> 4), floats(raw >> 8), floats(raw >> 12)
