"""The blocks of GGUF files."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from penstock.ops import native
from penstock.ops.quantized import cpu
from penstock.ops.quantized.contract import Example, Parts, WeightFormat
from penstock.policy import policy

#: The types that are quantized.
Kind = Literal["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]


@policy("weight.format", "ggml")
class Ggml(WeightFormat):
    """``blocks``, uint8 [M, bytes of a row], of the type ``kind`` of ggml, llama.cpp's library: of 32 numbers each, or
    of 256 (K)."""

    kind: Kind = "Q8_0"

    @property
    def unit(self) -> int:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        return GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]][0]

    def shape(self, parts: Parts) -> tuple[int, int]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        rows, length = parts["blocks"].shape
        return rows, length // size * numbers

    def dequantize(self, parts: Parts) -> Tensor:
        blocks = parts["blocks"]
        if not blocks.is_cuda and native.serves(cpu.SOURCE):
            return cpu.numbers(self.kind, blocks, self.shape(parts)[1])
        from gguf import GGMLQuantizationType, dequantize

        return torch.from_numpy(dequantize(blocks.cpu().numpy(), GGMLQuantizationType[self.kind])).to(blocks.device)

    def dequantizes(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def product(self, x: Tensor, parts: Parts) -> Tensor:
        if cpu.serves(x, x.shape[1], None):
            return cpu.product(self.kind, x, parts["blocks"])
        return super().product(x, parts)

    @classmethod
    def example(cls) -> Example:
        # A block of Q4_1: scale and minimum in float16, then 16 bytes, whose low halves come first.
        head = np.array([[0.5, -1.0], [2.0, 0.0], [1.0, 3.0]], np.float16).view(np.uint8)
        halves = np.tile(np.arange(16, dtype=np.uint8) * 16 + np.arange(15, -1, -1, dtype=np.uint8), (3, 1))
        codes = [*range(15, -1, -1), *range(16)]
        numbers = [[scale * code + least for code in codes] for scale, least in ((0.5, -1.0), (2.0, 0.0), (1.0, 3.0))]
        return Example(cls(kind="Q4_1"), {"blocks": torch.from_numpy(np.hstack([head, halves]))}, numbers)
