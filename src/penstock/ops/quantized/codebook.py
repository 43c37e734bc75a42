"""Four-bit numbers from a table."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from penstock.core.devices import lasting
from penstock.ops.quantized import cpu, cuda, nibbles
from penstock.ops.quantized.contract import Example, Parts, WeightFormat, spread
from penstock.policy import policy

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

#: What the sixteen codes stand for. NF4 (Dettmers et al., 2023, QLoRA) has the quantiles of a normal distribution,
#: scaled to 1; FP4 is a sign, two bits of the exponent, and one of the mantissa.
TABLES = {
    "fp4": (*_E2M1, *(-value for value in _E2M1)),
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ),
}


@policy("weight.format", "codebook4")
class Codebook4(WeightFormat):
    """Codes in ``values``, in either order of :mod:`~penstock.ops.quantized.nibbles`; each stands for a number of the
    ``table``, times the ``scale``, float32 [M, k], of its ``group`` of columns.

    On CUDA there are kernels for fp4, whose numbers are made of their bits."""

    table: Literal["fp4", "nf4"] = "nf4"
    group: PositiveInt = 64

    @property
    def unit(self) -> int:
        return self.group

    def shape(self, parts: Parts) -> tuple[int, int]:
        return len(parts["values"]), nibbles.columns_of(parts["values"])

    def dequantize(self, parts: Parts) -> Tensor:
        values = parts["values"]
        numbers = _numbers(self.table, values.device)[nibbles.codes(values).int()]
        return numbers * spread(parts["scale"], numbers.shape[1], self.group)

    def product(self, x: Tensor, parts: Parts) -> Tensor:
        columns, own = self.shape(parts)[1], (parts["values"], parts["scale"])
        if self.table == "fp4" and cuda.serves(x, columns, self.group):
            return cuda.product("e2m1", x, *own, group=self.group)
        if cpu.serves(x, columns, self.group):
            table = _numbers(self.table, x.device)
            return cpu.product("table4", x, *own, table=table, group=self.group)
        return super().product(x, parts)

    def grouped_product(self, x: Tensor, parts: Parts, ends: Tensor) -> Tensor | None:
        if self.table != "fp4" or not cuda.serves(x, self.shape(parts)[1], self.group):
            return None
        return cuda.grouped_product("e2m1", x, parts["values"], parts["scale"], ends=ends, group=self.group)

    def computes(self, device: torch.device, dtype: torch.dtype) -> bool:
        if device.type == "cpu":
            return True
        return self.table == "fp4" and cuda.computes(device, dtype, self.group, cuda.BFLOAT16)

    def arranged(self, parts: Parts) -> Parts:
        if self.table != "fp4":
            return parts
        return nibbles.arranged({**parts, "scale": cuda.arranged_for(parts["values"].device, parts["scale"])})

    def columns(self, parts: Parts, start: int, stop: int) -> Parts:
        return super().columns({**parts, "values": nibbles.paired(parts["values"])}, start, stop)

    @classmethod
    def example(cls) -> Example:
        parts = {
            "values": torch.tensor([[0x10, 0x97], [0xF2, 0x88], [0x53, 0x64]], dtype=torch.uint8),
            "scale": torch.tensor([[2.0, 1.0], [1.0, 0.5], [4.0, 8.0]]),
        }
        numbers = [[0.0, 1.0, 6.0, -0.5], [1.0, -6.0, 0.0, 0.0], [6.0, 12.0, 16.0, 32.0]]
        return Example(cls(table="fp4", group=2), parts, numbers)


@lasting
def _numbers(table: str, device: torch.device) -> Tensor:
    """What the codes of ``table`` stand for, on ``device``, where it stays: to bring it there would be to wait."""
    return torch.tensor(TABLES[table], device=device)
