"""GPTQ's integers: rows of several columns in an int32 word."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from penstock.core.errors import ModelError
from penstock.models.formats.contract import Stored
from penstock.models.formats.parts import pairs, part, unpacked
from penstock.ops.quantized.contract import Packed
from penstock.ops.quantized.integers import Int4, Int8


class Gptq:
    """``qweight`` int32 [K bits / 32, M], ``qzeros`` int32 [k, M bits / 32], ``scales`` [k, M], and ``g_idx`` int32
    [K], the group of each column. Zeros are stored less one, unless the ``checkpoint_format`` is ``gptq_v2``."""

    markers: Collection[str] = ("qweight",)
    suffixes: Collection[str] = ("qzeros", "scales", "g_idx")

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._bits, self._group = int(config["bits"]), int(config["group_size"])
        if self._bits not in (4, 8):
            raise ModelError(f"GPTQ of {self._bits} bits is not supported", hint="4 and 8 bits are.")
        self._less = 0 if config.get("checkpoint_format") == "gptq_v2" else 1

    def shape(self, headers: Mapping[str, Stored]) -> tuple[int, int]:
        words, rows = headers["qweight"].shape
        return rows, words * 32 // self._bits

    def pack(self, module: str, tensors: Mapping[str, Tensor]) -> Packed:
        words, scale = tensors["qweight"], part(module, tensors, "scales").float()
        rows, columns = words.shape[1], words.shape[0] * 32 // self._bits
        size = columns if self._group == -1 else self._group
        zeros = unpacked(part(module, tensors, "qzeros"), self._bits, rows)
        if scale.shape != (-(-columns // size), rows) or zeros.shape != scale.shape:
            raise ModelError(f"the scales of {module} are {list(scale.shape)}, which its matrix does not fit")
        order = tensors.get("g_idx")
        if order is not None and not torch.equal(order.long(), torch.arange(columns) // size):
            raise ModelError(
                f"the columns of {module} are in an order of their own (desc_act), which is not supported",
                hint="A checkpoint that was made with desc_act = false works.",
            )
        half = 2 ** (self._bits - 1)
        factors = scale.T.contiguous()
        affine = {"scale": factors, "offset": factors * (half - (zeros.T.float() + self._less))}
        if self._bits == 4:
            return Packed(Int4(group=size), {"values": pairs(words.T, columns), **affine})
        values = unpacked(words.T, self._bits, columns)
        return Packed(Int8(group=size), {"values": (values.to(torch.int16) - half).to(torch.int8), **affine})
