"""DeepSeek's 8-bit floating point: a scale for each block of 128 rows and columns."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from penstock.core.errors import ModelError
from penstock.models.formats.contract import Stored
from penstock.models.formats.parts import part, scales
from penstock.ops.quantized.contract import Packed
from penstock.ops.quantized.fp8 import Fp8


class BlockFp8:
    """``weight`` in e4m3 and ``weight_scale_inv``, by which it is multiplied, despite its name."""

    marker = "weight_scale_inv"
    suffixes: Collection[str] = ("weight",)

    def __init__(self, config: Mapping[str, Any]) -> None:
        rows, columns = config["weight_block_size"]
        self._block = (int(rows), int(columns))
        self._rounds = config.get("activation_scheme") == "dynamic"

    def shape(self, headers: Mapping[str, Stored]) -> tuple[int, int]:
        rows, columns = headers["weight"].shape if "weight" in headers else (-1, -1)
        return rows, columns

    def pack(self, module: str, tensors: Mapping[str, Tensor]) -> Packed:
        values = part(module, tensors, "weight")
        if values.dtype != torch.float8_e4m3fn:
            raise ModelError(f"the weight of {module} is {values.dtype}, not float8_e4m3fn")
        shape = (values.shape[0], values.shape[1])
        factors = scales(module, tensors[self.marker], shape, self._block)
        return Packed(Fp8(group=self._block[1], rounds=self._rounds), {"values": values, "scale": factors})
