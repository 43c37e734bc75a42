"""bitsandbytes' NF4 and FP4: blocks of a matrix that is laid out as one row."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from penstock.core.errors import ModelError
from penstock.models.formats.contract import Stored
from penstock.models.formats.parts import part
from penstock.ops.quantized.codebook import TABLES, Codebook4
from penstock.ops.quantized.contract import Packed


class BitsAndBytes:
    """``weight`` uint8 [M K / 2, 1], the first of two numbers in the high bits, with the largest number of each block
    in ``weight.absmax``, or, of nested quantization, what it becomes by ``nested_quant_map`` and ``nested_absmax``. A
    tensor of JSON says the rest."""

    markers: Collection[str] = ("weight.absmax",)
    state = "weight.quant_state.bitsandbytes__nf4"
    suffixes: Collection[str] = (
        *("weight", state, "weight.quant_map"),
        *("weight.nested_absmax", "weight.nested_quant_map"),
    )

    def __init__(self, config: Mapping[str, Any]) -> None:
        kind = config.get("bnb_4bit_quant_type", "fp4")
        if not config.get("load_in_4bit", config.get("_load_in_4bit")) or kind != "nf4":
            raise ModelError("of bitsandbytes' quantizations, only nf4 is supported")

    def shape(self, headers: Mapping[str, Stored]) -> tuple[int, int]:
        return -1, -1

    def pack(self, module: str, tensors: Mapping[str, Tensor]) -> Packed:
        try:
            state = json.loads(bytes(part(module, tensors, self.state).tolist()))
            (rows, columns), size = state["shape"], int(state["blocksize"])
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"the quant_state of {module} cannot be read: {error}") from error
        largest, values = tensors["weight.absmax"], part(module, tensors, "weight").flatten()
        if "weight.nested_absmax" in tensors:
            table, nested = part(module, tensors, "weight.nested_quant_map"), tensors["weight.nested_absmax"]
            each = nested.float().repeat_interleave(int(state["nested_blocksize"]))[: largest.numel()]
            largest = table.float()[largest.int()] * each + float(state["nested_offset"])
        if values.numel() * 2 != rows * columns or largest.numel() * size != rows * columns or columns % size:
            raise ModelError(f"the weight of {module} is not of {rows} x {columns} numbers in blocks of {size}")
        table = part(module, tensors, "weight.quant_map").float()
        if not torch.allclose(table, torch.tensor(TABLES["nf4"]), atol=1e-6):
            raise ModelError(f"the quant_map of {module} is not that of nf4")
        low_first = (values >> 4 | values << 4).view(rows, columns // 2)
        scale = largest.float().view(rows, columns // size).contiguous()
        return Packed(Codebook4(table="nf4", group=size), {"values": low_first, "scale": scale})
