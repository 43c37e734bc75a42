"""8-bit floating point as DeepSeek stores it, with a scale for each block, or with one for a matrix."""

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

#: What is left out of a config.json: transformers takes blocks of that size.
BLOCK = (128, 128)


class Float8:
    """``weight`` in e4m3 and ``weight_scale_inv``, by which it is multiplied, despite its name, or ``weight_scale``,
    which is the same; one for each block of the ``weight_block_size``, or one number."""

    markers: Collection[str] = ("weight_scale_inv", "weight_scale")
    suffixes: Collection[str] = ("weight",)

    def __init__(self, config: Mapping[str, Any]) -> None:
        size = config.get("weight_block_size", BLOCK)
        self._block: tuple[int, int] | None = None
        if size is not None:
            rows, columns = size
            self._block = (int(rows), int(columns))
        self._rounds = config.get("activation_scheme") in ("dynamic", "static")

    def shape(self, headers: Mapping[str, Stored]) -> tuple[int, int]:
        rows, columns = headers["weight"].shape if "weight" in headers else (-1, -1)
        return rows, columns

    def pack(self, module: str, tensors: Mapping[str, Tensor]) -> Packed:
        values = part(module, tensors, "weight")
        if values.dtype != torch.float8_e4m3fn:
            raise ModelError(f"the weight of {module} is {values.dtype}, not float8_e4m3fn")
        shape = (values.shape[0], values.shape[1])
        scale = next(tensors[name] for name in self.markers if name in tensors)
        # Files with a scale for each matrix often leave the size of blocks out.
        block = None if scale.numel() == 1 else self._block
        factors = scales(module, scale, shape, block or shape)
        return Packed(Fp8(group=block[1] if block else None, rounds=self._rounds), {"values": values, "scale": factors})
