"""8-bit floating point."""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import Tensor

from penstock.ops.quantized import cpu
from penstock.ops.quantized.contract import Example, Parts, WeightFormat, spread
from penstock.policy import policy


@policy("weight.format", "fp8")
class Fp8(WeightFormat):
    """``values``, float8_e4m3fn [M, K], each times the ``scale``, float32 [M, k], of its ``group`` of columns (None:
    of its row)."""

    group: PositiveInt | None = None

    @property
    def unit(self) -> int:
        return self.group or 1

    def shape(self, parts: Parts) -> tuple[int, int]:
        rows, columns = parts["values"].shape
        return rows, columns

    def dequantize(self, parts: Parts) -> Tensor:
        return parts["values"].float() * spread(parts["scale"], parts["values"].shape[1], self.group)

    def product(self, x: Tensor, parts: Parts) -> Tensor:
        values, scale = parts["values"], parts["scale"]
        if cpu.serves(x, values.shape[1], self.group):
            return cpu.product("e4m3", x, values, scale, group=self.group)
        return super().product(x, parts)

    @classmethod
    def example(cls) -> Example:
        # Bits of e4m3: a sign, four of the exponent with bias 7, three of the mantissa.
        bits = torch.tensor([[0b0_0111_000, 0b1_1000_100, 0b0_0000_001], [0b0_1111_110] * 3, [0b1_0110_001] * 3])
        parts = {
            "values": bits.to(torch.uint8).view(torch.float8_e4m3fn),
            "scale": torch.tensor([[2.0, 0.5], [1.0, 0.25], [4.0, 8.0]]),
        }
        return Example(cls(group=2), parts, [[2, -6, 2**-10], [448, 448, 112], [-2.25, -2.25, -4.5]])
