"""8-bit floating point."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from penstock.ops.quantized import cpu, cuda
from penstock.ops.quantized.contract import Example, Parts, WeightFormat, spread
from penstock.policy import policy


@policy("weight.format", "fp8")
class Fp8(WeightFormat):
    """``values``, float8_e4m3fn [M, K], each times the ``scale``, float32 [M, k], of its ``group`` of columns (None:
    of its row).

    Where it ``rounds``, as most schemes want it, many rows of x are rounded to e4m3 for a product on CUDA, with a scale
    for each row, or group of 128 columns, that takes its largest number to the largest of e4m3: matrix units multiply
    twice as many numbers then. From how many rows on, and with which libraries, says
    :func:`~penstock.ops.quantized.cuda.rounds`.
    """

    group: PositiveInt | None = None
    rounds: bool = False

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
        if cuda.serves(x, values.shape[1], self.group):
            return cuda.product("e4m3", x, values, scale, group=self.group, rounds=self.rounds)
        if cpu.serves(x, values.shape[1], self.group):
            return cpu.product("e4m3", x, values, scale, group=self.group)
        return super().product(x, parts)

    def grouped_product(self, x: Tensor, parts: Parts, ends: Tensor) -> Tensor | None:
        """Rows of x are not rounded in it, however many there are."""
        if not cuda.serves(x, self.shape(parts)[1], self.group):
            return None
        return cuda.grouped_product("e4m3", x, parts["values"], parts["scale"], ends=ends, group=self.group)

    def arranged(self, parts: Parts) -> Parts:
        return {**parts, "scale": cuda.arranged_for(parts["scale"].device, parts["scale"])}

    def computes(self, device: torch.device, dtype: torch.dtype) -> bool:
        return device.type == "cpu" or cuda.computes(device, dtype, self.group, cuda.E4M3)

    def exact(self) -> WeightFormat:
        return self.model_copy(update={"rounds": False})

    def rounding(self, x: Tensor, parts: Parts) -> Tensor:
        rows, columns = self.shape(parts)
        if not (self.rounds and cuda.serves(x, columns, self.group) and cuda.rounds(x, (rows, columns), self.group)):
            return super().rounding(x, parts)
        return rounding_of_rows(x, self.group) @ self.dequantize(parts).abs().T

    @classmethod
    def example(cls) -> Example:
        # Bits of e4m3: a sign, four of the exponent with bias 7, three of the mantissa.
        bits = torch.tensor([[0b0_0111_000, 0b1_1000_100, 0b0_0000_001], [0b0_1111_110] * 3, [0b1_0110_001] * 3])
        parts = {
            "values": bits.to(torch.uint8).view(torch.float8_e4m3fn),
            "scale": torch.tensor([[2.0, 0.5], [1.0, 0.25], [4.0, 8.0]]),
        }
        return Example(cls(group=2), parts, [[2, -6, 2**-10], [448, 448, 112], [-2.25, -2.25, -4.5]])


def rounding_of_rows(x: Tensor, group: int | None) -> Tensor:
    """The most that numbers of ``x`` [N, K] differ from those in e4m3 that are nearest to them, float32 [N, K], where
    the largest number of each ``group`` of columns becomes the largest of e4m3: half of the last of three bits behind
    the first, or of the smallest number."""
    size = group or x.shape[1]
    largest = F.pad(x.float().abs(), (0, -x.shape[1] % size)).view(len(x), -1, size).amax(-1)
    least = spread(largest, x.shape[1], size) / torch.finfo(torch.float8_e4m3fn).max * 2**-10
    return torch.maximum(x.float().abs() * 2**-4, least) * (1 + 2**-10)  # divided and multiplied in float32
