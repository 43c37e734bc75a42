"""The law of ``weight.format``.

Bugs that its clauses are there to catch:

- the example: halves of a byte in the wrong order, a sign or an offset that is lost, a scale of another group or row.
- rows: a scale that belongs to other rows once some were cut off.
- product: a kernel that reads other numbers than the format's definition gives, or leaves out what is left over behind
  whole vectors and blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.core.randomness import torch_generator
from penstock.ops.quantized.contract import Parts, WeightFormat, cut


def check(format: WeightFormat, device: torch.device | str = "cpu") -> None:
    """Asserts the law of ``weight.format`` on the policy's example, and on larger matrices made of its rows."""
    format, parts, matrix = format.example()
    parts = {name: part.to(device) for name, part in parts.items()}
    wanted = torch.tensor(matrix, dtype=torch.float64, device=device)
    found = format.dequantize(parts)
    assert found.dtype == torch.float32, f"numbers are {found.dtype}"
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)
    assert format.shape(parts) == tuple(found.shape), f"the shape is said to be {format.shape(parts)}"
    check_rows(format, parts, found)
    for count in (1, 2, 5, 33):
        check_product(format, many(parts), count)


def check_rows(format: WeightFormat, parts: Parts, whole: Tensor) -> None:
    """Rows that are cut off stand for the same numbers."""
    for start in range(len(whole)):
        for stop in range(start + 1, len(whole) + 1):
            torch.testing.assert_close(format.dequantize(cut(parts, start, stop)), whole[start:stop], rtol=0, atol=0)


def many(parts: Parts) -> Parts:
    """The rows of the example again and again, in another order: 37 of them."""
    order = torch.randint(len(next(iter(parts.values()))), (37,), generator=torch_generator(0, "weight.format"))
    return {name: part[order.to(part.device)] for name, part in parts.items()}


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
