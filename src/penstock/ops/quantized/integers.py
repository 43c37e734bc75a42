"""Integers of 8 and of 4 bits."""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import Tensor

from penstock.ops.quantized import cpu, cuda, nibbles
from penstock.ops.quantized.contract import Example, Parts, WeightFormat, spread
from penstock.policy import policy


class Integers(WeightFormat):
    """Integers, each times the ``scale`` of its ``group`` of columns (None: of its row), plus the group's ``offset``
    where there is one; both float32 [M, k]."""

    group: PositiveInt | None = None

    def integers(self, parts: Parts) -> Tensor:
        """The integers [M, K]."""
        raise NotImplementedError

    def arranged(self, parts: Parts) -> Parts:
        device = parts["values"].device
        factors = {name: cuda.arranged_for(device, part) for name, part in parts.items() if name != "values"}
        return {**parts, **factors}

    @property
    def unit(self) -> int:
        return self.group or 1

    def product(self, x: Tensor, parts: Parts) -> Tensor:
        columns, scale, offset = self.shape(parts)[1], parts["scale"], parts.get("offset")
        if cuda.serves(x, columns, self.group):
            return cuda.product(self.policy_name, x, parts["values"], scale, offset, group=self.group)
        if cpu.serves(x, columns, self.group):
            return cpu.product(self.policy_name, x, parts["values"], scale, offset, group=self.group)
        return super().product(x, parts)

    def grouped_product(self, x: Tensor, parts: Parts, ends: Tensor) -> Tensor | None:
        if not cuda.serves(x, self.shape(parts)[1], self.group):
            return None
        own = parts["values"], parts["scale"], parts.get("offset")
        return cuda.grouped_product(self.policy_name, x, *own, ends=ends, group=self.group)

    def computes(self, device: torch.device, dtype: torch.dtype) -> bool:
        return device.type == "cpu" or cuda.computes(device, dtype, self.group, cuda.BFLOAT16)

    def dequantize(self, parts: Parts) -> Tensor:
        columns = self.shape(parts)[1]
        numbers = self.integers(parts) * spread(parts["scale"], columns, self.group)
        return numbers + spread(parts["offset"], columns, self.group) if "offset" in parts else numbers


@policy("weight.format", "int8")
class Int8(Integers):
    """Integers from -128 to 127 in ``values``, int8 [M, K]; see :class:`Integers` for what they are multiplied with."""

    def shape(self, parts: Parts) -> tuple[int, int]:
        rows, columns = parts["values"].shape
        return rows, columns

    def integers(self, parts: Parts) -> Tensor:
        return parts["values"]

    @classmethod
    def example(cls) -> Example:
        parts = {
            "values": torch.tensor([[1, -2, 3], [127, -128, 0], [4, 5, 6]], dtype=torch.int8),
            "scale": torch.tensor([[2.0, 0.5], [1.0, 0.25], [-1.0, 1.0]]),
            "offset": torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 10.0]]),
        }
        return Example(cls(group=2), parts, [[2, -4, 1.5], [128, -127, 0], [-4, -5, 16]])


@policy("weight.format", "int4", papers=[223])
class Int4(Integers):
    """Integers from -8 to 7, stored with 8 added in ``values``, in either order of
    :mod:`~penstock.ops.quantized.nibbles`; see :class:`Integers` for what they are multiplied with.

    On CUDA, in the manner of MARLIN, the weights are read in 4 bits, asynchronously and some tiles ahead, in an order
    of their own, and decoded in registers by writing them into mantissas, as matrix units take them; sums are cut where
    the matrix would not keep the device busy. Ours: the kernel in Triton, which scales sums instead of weights where
    there are few rows, and plain weights in pieces for a library's product where there are many. Not built: stripes of
    tiles that even out the last wave, and 2:4 sparsity.
    """

    @property
    def unit(self) -> int:
        return self.group or 2

    def shape(self, parts: Parts) -> tuple[int, int]:
        return len(parts["values"]), nibbles.columns_of(parts["values"])

    def integers(self, parts: Parts) -> Tensor:
        return nibbles.codes(parts["values"]).to(torch.int8) - 8

    def arranged(self, parts: Parts) -> Parts:
        return nibbles.arranged(super().arranged(parts))

    def columns(self, parts: Parts, start: int, stop: int) -> Parts:
        return super().columns({**parts, "values": nibbles.paired(parts["values"])}, start, stop)

    @classmethod
    def example(cls) -> Example:
        parts = {
            "values": torch.tensor([[0x98, 0x7A], [0xF0, 0x88], [0x10, 0x32]], dtype=torch.uint8),
            "scale": torch.tensor([[2.0, 1.0], [1.0, 0.5], [1.0, 1.0]]),
            "offset": torch.tensor([[0.0, 0.0], [0.0, 3.0], [8.0, 0.0]]),
        }
        return Example(cls(group=2), parts, [[0, 2, 2, -1], [-8, 7, 3, 3], [0, 1, -6, -5]])
