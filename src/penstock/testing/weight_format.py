"""The law of ``weight.format``.

Bugs that its clauses are there to catch:

- the example: halves of a byte in the wrong order, a sign or an offset that is lost, a scale of another group or row.
- rows: a scale that belongs to other rows once some were cut off.
- columns: a scale that belongs to other columns; a unit that is cut in two and stands for other numbers then.
- strides: parts that are kept as products want them, and stand for other numbers then.
- product: a kernel that reads other numbers than the format's definition gives, or leaves out what is left over behind
  whole vectors and blocks.
- computes: a format that models have as plain numbers on a CPU, as it has no kernels elsewhere.
- gradient: one of other rows; numbers that a backward pass would have to keep, where memory is what the format saves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.core.errors import UsageError
from penstock.core.randomness import torch_generator
from penstock.ops.quantized.contract import Packed, Parts, WeightFormat, cut
from penstock.testing.refusals import refused


def check(format: WeightFormat, device: torch.device | str = "cpu") -> None:
    """Asserts the law of ``weight.format`` on the policy's example, and on larger matrices made of its rows."""
    format, parts, matrix = format.example()
    larger = many(parts)  # on the host, where numbers of all kinds can be indexed
    parts, larger = ({name: part.to(device) for name, part in each.items()} for each in (parts, larger))
    wanted = torch.tensor(matrix, dtype=torch.float64, device=device)
    found = format.dequantize(parts)
    assert found.dtype == torch.float32, f"numbers are {found.dtype}"
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)
    assert format.shape(parts) == tuple(found.shape), f"the shape is said to be {format.shape(parts)}"
    for dtype in (torch.float32, torch.bfloat16):
        assert format.computes(torch.device("cpu"), dtype), f"models in {dtype} have plain numbers on a CPU"
    check_rows(format, parts, found)
    check_columns(format, parts, found)
    torch.testing.assert_close(format.dequantize(format.arranged(parts)), found, rtol=0, atol=0)
    for count in (1, 2, 5, 33):
        check_product(format, larger, count)
        check_gradient(format.exact(), larger, count)


def check_rows(format: WeightFormat, parts: Parts, whole: Tensor) -> None:
    """Rows that are cut off stand for the same numbers."""
    for start in range(len(whole)):
        for stop in range(start + 1, len(whole) + 1):
            torch.testing.assert_close(format.dequantize(cut(parts, start, stop)), whole[start:stop], rtol=0, atol=0)


def check_columns(format: WeightFormat, parts: Parts, whole: Tensor) -> None:
    """Columns between two units stand for the same numbers; where a unit would be cut, that is refused."""
    if whole.shape[1] % format.unit == 0:  # of one unit alone nothing could be cut
        parts, whole = {name: part.repeat(1, 2) for name, part in parts.items()}, whole.repeat(1, 2)
    columns = whole.shape[1]
    for start in range(columns):
        for stop in range(start + 1, columns + 1):
            if start % format.unit or (stop % format.unit and stop != columns):
                with refused(UsageError, "stored together"):
                    format.columns(parts, start, stop)
            else:
                found = format.dequantize(format.columns(parts, start, stop))
                torch.testing.assert_close(found, whole[:, start:stop], rtol=0, atol=0)


def many(parts: Parts) -> Parts:
    """The rows of the example again and again, in another order: 37 of them."""
    order = torch.randint(len(next(iter(parts.values()))), (37,), generator=torch_generator(0, "weight.format"))
    return {name: part[order] for name, part in parts.items()}


def check_product(format: WeightFormat, parts: Parts, count: int) -> None:
    """The product of ``count`` rows is that with the dequantized matrix, in float64."""
    matrix = format.dequantize(parts)
    x = torch.randn(count, matrix.shape[1], generator=torch_generator(count, "weight.format/x")).to(matrix.device)
    for dtype in (torch.float32, torch.bfloat16):
        rows = x.to(dtype)
        found, wanted = format.product(rows, parts), rows.double() @ matrix.double().T
        assert found.dtype == dtype, f"the product of {dtype} is {found.dtype}"
        terms = rows.double().abs() @ matrix.double().abs().T
        bound = 4 * torch.finfo(dtype).eps * terms + format.rounding(rows, parts).to(terms)
        over = (found.double() - wanted).abs() - bound
        assert (over <= 0).all(), f"{count} rows of {dtype}: a number is off by {over.max():.3g} more than may be"


def check_gradient(format: WeightFormat, parts: Parts, count: int) -> None:
    """The gradient of ``count`` rows is that of a product with the dequantized matrix, in float64, and nothing is kept
    for it."""
    matrix, draw = format.dequantize(parts), torch_generator(count, "weight.format/gradient")
    x, along = (torch.randn(count, size, generator=draw).to(matrix.device) for size in reversed(matrix.shape))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        rows, given, kept = x.to(dtype).requires_grad_(), along.to(dtype), list[Tensor]()
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda none: none):
            out = Packed(format, parts).product(rows)
        assert not kept, f"tensors of {[tuple(each.shape) for each in kept]} are kept for the gradient"
        (found,) = torch.autograd.grad(out, rows, given)
        rounded = 4 * torch.finfo(dtype).eps + len(matrix) * torch.finfo(torch.float64).eps
        bound = rounded * (given.double().abs() @ matrix.double().abs())
        over = (found.double() - given.double() @ matrix.double()).abs() - bound
        assert found.dtype == dtype, f"the gradient of {dtype} is {found.dtype}"
        assert (over <= 0).all(), (
            f"{count} rows of {dtype}: a number of the gradient is off by {over.max():.3g} too much"
        )
