"""Products with quantized matrices on CUDA: which kernel multiplies how many rows."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.library import Library, register_fake

from penstock.core.devices import can_compile

#: Columns that kernels decode at a time at least: groups are of so many whole ones.
UNIT = 32

#: Up to so many rows, they are not rounded to e4m3, for a matrix with a scale for each row, or block of columns: see
#: :func:`rounds`. All are measured on an H200.
FEW, FEW_BY_BLOCK = 64, 32

#: Up to so many rows, a kernel that decodes the matrix for each tile of the result takes less time than a library's
#: product with plain numbers and making these.
SOME = 256

#: Columns that have a scale in a library's products of e4m3 by block.
BLOCK = 128

#: Plain numbers that are made at a time, and multiplied while most of them are in the device's second cache.
PIECE = 1 << 25

#: Stands for the columns of a group where a row is one.
WHOLE = 1 << 30

#: What devices can do from which generation on: multiply bfloat16, and convert e4m3.
BFLOAT16, E4M3 = (8, 0), (8, 9)

_library = Library("penstock", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "quantized_product(str kind, Tensor x, Tensor values, Tensor scale, Tensor? offset, int? group, bool rounds)"
    " -> Tensor"
)
_library.define(  # type: ignore[no-untyped-call]
    "quantized_grouped_product(str kind, Tensor x, Tensor values, Tensor scale, Tensor? offset, Tensor ends,"
    " int? group) -> Tensor"
)


def computes(device: torch.device, dtype: torch.dtype, group: int | None, generation: tuple[int, int]) -> bool:
    """Whether there are kernels for matrices in groups of ``group`` columns, on a ``device`` of this generation or a
    later one, where x has the ``dtype``."""
    fits = dtype is torch.bfloat16 and (group is None or group % UNIT == 0)
    return fits and can_compile(device) and torch.cuda.get_device_capability(device) >= generation


def serves(x: Tensor, columns: int, group: int | None) -> bool:
    """Whether ``x`` [N, K] is multiplied by a kernel with a matrix of so many columns, in groups of ``group``."""
    return x.is_cuda and x.dtype is torch.bfloat16 and columns % 2 == 0 and (group is None or group % UNIT == 0)


def rounds(x: Tensor, shape: tuple[int, int], group: int | None) -> bool:
    """Whether as many rows as ``x`` [N, K] has are rounded to e4m3 for a product with a matrix of the ``shape`` in it,
    with scales of each ``group`` of columns.

    That costs accuracy, and is done only where it gains time. Up to 16 rows, a product takes as long as reading the
    matrix, whoever multiplies; up to :data:`FEW_BY_BLOCK`, a library's with scales by block gains little, and up to
    :data:`FEW`, that with scales by row gains nothing. Where no library multiplies by such blocks, rows are not
    rounded: a kernel of our own took about as long as decoding the matrix, for whatever number of rows.
    """
    count, (rows, columns) = x.shape[0], shape
    if rows % 16 or columns % 16:  # which libraries want
        return False
    if group is None:
        return count > FEW
    whole = group == BLOCK and columns % group == 0
    return count > FEW_BY_BLOCK and whole and multiplies_blocks(x.device)


@functools.cache
def multiplies_blocks(device: torch.device) -> bool:
    """Whether a library multiplies e4m3 on ``device`` with scales for each row of each block of 128 columns. That
    depends on the device and on versions of libraries, of which none tells, so that it is tried."""
    values, scale = torch.zeros(256, 256, device=device).to(torch.float8_e4m3fn), torch.ones(256, 2, device=device)
    try:
        torch._scaled_mm(values, values.T, arranged(scale), arranged(scale).T, out_dtype=torch.bfloat16)
    except (RuntimeError, ValueError):
        return False
    return True


def arranged(scale: Tensor) -> Tensor:
    """The same scales [M, k], those of a group of columns contiguous: a program reads those of its rows at a time, and
    a library's products in e4m3 want them so."""
    return scale.T.contiguous().T


def arranged_for(device: torch.device, scale: Tensor) -> Tensor:
    """The same scales [M, k] as products on the ``device`` want them."""
    return scale.contiguous() if device.type == "cpu" else arranged(scale)


def product(
    kind: str,
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    *,
    group: int | None = None,
    rounds: bool = False,
) -> Tensor:
    """``x`` bfloat16 [N, K] times the transpose of a matrix [M, K]: bfloat16 [N, M]. To torch.compile it is one
    operator, so that a pass compiled for any number of rows can choose at each call; it waits for nothing.

    Args:
        kind: how the matrix is stored: int4, e2m1, int8, e4m3.
        values: its rows as they are stored, [M, ...].
        scale: float32 [M, k] of the groups of columns.
        offset: the same, added.
        group: columns of a group; None: all of them.
        rounds: whether many rows may be rounded to e4m3, for a matrix in it.
    """
    out: Tensor = torch.ops.penstock.quantized_product(kind, x, values, scale, offset, group, rounds)
    return out


def _product(
    kind: str, x: Tensor, values: Tensor, scale: Tensor, offset: Tensor | None, group: int | None, rounded: bool
) -> Tensor:
    from penstock.ops.quantized import packed_kernel, plain_kernel, rounded_kernel

    (count, size), height = x.shape, values.shape[0]
    if not count or not height:
        return x.new_zeros(count, height)
    x, values, scale, offset = _ready(x, values, scale, offset)
    if rounded and rounds(x, (height, size), group):
        return rounded_kernel.product(x, values, scale, group)
    columns = group or WHOLE
    if count <= SOME:
        return packed_kernel.product(kind, x, values, scale, offset, columns)
    out, step = x.new_empty(count, height), max(1, PIECE // size)
    for start in range(0, height, step):
        rows = slice(start, start + step)
        added = None if offset is None else offset[rows]
        piece = plain_kernel.plain(kind, values[rows], scale[rows], added, columns)
        torch.mm(x, piece.T, out=out[:, rows])
    return out


def _ready(
    x: Tensor, values: Tensor, scale: Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same as kernels take them."""
    if offset is not None and offset.stride() != scale.stride():
        scale, offset = scale.contiguous(), offset.contiguous()
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x, values.contiguous(), scale, offset


def grouped_product(
    kind: str,
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    *,
    ends: Tensor,
    group: int | None = None,
) -> Tensor:
    """``x`` bfloat16 [N, K], whose rows are sorted by expert, each times the transpose of its expert's matrix: bfloat16
    [N, M]. To torch.compile it is one operator, too; it waits for nothing, and decodes matrices in registers alone.

    Args:
        kind, values, scale, offset, group: as of :func:`product`, of the matrices of all experts one below the other.
        ends: int32 [E], where the rows of each expert end.
    """
    out: Tensor = torch.ops.penstock.quantized_grouped_product(kind, x, values, scale, offset, ends, group)
    return out


def _grouped_product(
    kind: str, x: Tensor, values: Tensor, scale: Tensor, offset: Tensor | None, ends: Tensor, group: int | None
) -> Tensor:
    from penstock.ops.quantized import grouped_kernel

    if not len(x):
        return x.new_zeros(0, values.shape[0] // len(ends))
    x, values, scale, offset = _ready(x, values, scale, offset)
    return grouped_kernel.product(kind, x, values, scale, offset, ends, group or WHOLE)


def _shape(
    kind: str, x: Tensor, values: Tensor, scale: Tensor, offset: Tensor | None, group: int | None, rounded: bool
) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[0])


_library.impl("quantized_product", _product, "CUDA")  # type: ignore[no-untyped-call]
register_fake("penstock::quantized_product", _shape, lib=_library)
_library.impl("quantized_grouped_product", _grouped_product, "CUDA")  # type: ignore[no-untyped-call]
register_fake(
    "penstock::quantized_grouped_product",
    lambda kind, x, values, scale, offset, ends, group: x.new_empty(x.shape[0], values.shape[0] // ends.shape[0]),
    lib=_library,
)
