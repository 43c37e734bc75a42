"""AWQ's four bits: columns of eight rows in an int32 word, in an order of its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from penstock.core.errors import ModelError
from penstock.models.formats.contract import Stored
from penstock.models.formats.parts import nibbles, part
from penstock.ops.quantized.contract import Packed
from penstock.ops.quantized.integers import Int4

#: Where each of eight rows lies in a word: in which of its four bits, from the lowest.
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


class Awq:
    """``qweight`` int32 [K, M / 8], ``qzeros`` int32 [k, M / 8] and ``scales`` [k, M], for k groups of columns."""

    markers: Collection[str] = ("qweight",)
    suffixes: Collection[str] = ("qzeros", "scales")

    def __init__(self, config: Mapping[str, Any]) -> None:
        bits = config.get("bits", config.get("w_bit", 4))
        if bits != 4 or str(config.get("version", "gemm")).lower() != "gemm":
            raise ModelError(f"AWQ of {bits} bits in the version {config.get('version')!r} is not supported")
        self._group = int(config.get("group_size", config.get("q_group_size", 128)))

    def shape(self, headers: Mapping[str, Stored]) -> tuple[int, int]:
        columns, words = headers["qweight"].shape
        return 8 * words, columns

    def pack(self, module: str, tensors: Mapping[str, Tensor]) -> Packed:
        values, scale = _rows(tensors["qweight"]), part(module, tensors, "scales").float()
        zeros = _rows(part(module, tensors, "qzeros"))
        columns, rows = values.shape
        size = columns if self._group == -1 else self._group
        if scale.shape != (-(-columns // size), rows) or zeros.shape != scale.shape:
            raise ModelError(f"the scales of {module} are {list(scale.shape)}, which its matrix does not fit")
        factors = scale.T.contiguous()
        offset = factors * (8 - zeros.T.float())
        return Packed(Int4(group=size), {"values": nibbles(values.T), "scale": factors, "offset": offset})


def _rows(words: Tensor) -> Tensor:
    """The numbers in int32 ``words`` [n, M / 8]: uint8 [n, M]."""
    found = torch.stack([words >> 4 * place & 15 for place in ORDER], -1)
    return found.flatten(1).to(torch.uint8)
