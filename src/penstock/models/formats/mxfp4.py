"""gpt-oss's MXFP4: the experts of a layer in one tensor of 4-bit numbers and one of exponents."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from penstock.core.errors import ModelError
from penstock.models.formats.contract import Stored
from penstock.models.formats.safetensors import Safetensors
from penstock.ops.quantized.codebook import TABLES, Codebook4
from penstock.ops.quantized.contract import Packed

#: How the names of the two tensors end, behind that of the weight.
BLOCKS, SCALES = "_blocks", "_scales"

#: Numbers that share an exponent, two in a byte.
GROUP = 32


class Mxfp4:
    """The weights of a folder whose ``quant_method`` is ``mxfp4``; see
    :class:`~penstock.models.formats.contract.Weights`.

    A stack of matrices that is [experts, K, M] in a folder of plain numbers lies there by its rows of M: ``_blocks``
    uint8 [experts, M, K / 32, 16], the first of two numbers in the low bits, and ``_scales`` uint8 [experts, M,
    K / 32], exponents of two with 127 added. As plain numbers it is bf16, which holds each of them exactly; packed it
    is one matrix [experts * M, K].

    Raises:
        ModelError: there is none, one of the two tensors of a stack is missing, or they do not fit together.
    """

    def __init__(self, stored: Safetensors) -> None:
        self._stored = stored
        self.headers = dict(stored.headers)
        self._stacks = sorted(
            {name.removesuffix(end) for end in (BLOCKS, SCALES) for name in stored.headers if name.endswith(end)}
        )
        if not self._stacks:
            raise ModelError(
                f"the weights are quantized by 'mxfp4', it says, but none has {BLOCKS}",
                hint="Where they are not quantized, remove quantization_config.",
            )
        for name in self._stacks:
            self.headers[name] = self._header(name)
        self.dtypes = (*stored.dtypes, "quantized")
        self.quantized: Collection[str] = self._stacks

    def _header(self, name: str) -> Stored:
        """The header of a stack, in place of those of its two tensors."""
        for end in (BLOCKS, SCALES):
            if f"{name}{end}" not in self.headers:
                raise ModelError(f"{name} lacks {name}{end}", hint="Is the checkpoint complete?")
        blocks, scales = self.headers.pop(f"{name}{BLOCKS}"), self.headers.pop(f"{name}{SCALES}")
        for end, header in ((BLOCKS, blocks), (SCALES, scales)):
            if header.dtype != "U8":
                raise ModelError(f"{name}{end} in {header.path} holds {header.dtype}, not U8")
        if len(blocks.shape) != 4 or blocks.shape[3] != GROUP // 2 or blocks.shape[:3] != scales.shape:
            raise ModelError(
                f"{name}{BLOCKS} in {blocks.path} is {list(blocks.shape)} and {name}{SCALES} {list(scales.shape)}: "
                f"they must be [experts, rows, groups, {GROUP // 2}] and [experts, rows, groups]"
            )
        experts, rows, groups, _ = blocks.shape
        return Stored(blocks.path, (experts, groups * GROUP, rows), "quantized")

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        yield from self._stored.read([name for name in names if name not in self._stacks])
        for name in [name for name in self._stacks if name in names]:
            found = dict(self._stored.read([f"{name}{BLOCKS}", f"{name}{SCALES}"]))
            yield name, numbers(found[f"{name}{BLOCKS}"], found[f"{name}{SCALES}"])

    def packed(self, names: Collection[str]) -> Iterator[tuple[str, Packed]]:
        for name in [name for name in self._stacks if name in names]:
            found = dict(self._stored.read([f"{name}{BLOCKS}", f"{name}{SCALES}"]))
            values = found[f"{name}{BLOCKS}"].flatten(0, 1).flatten(1)
            scale = torch.exp2(found[f"{name}{SCALES}"].flatten(0, 1).float() - 127)
            yield name, Packed(Codebook4(table="fp4", group=GROUP), {"values": values, "scale": scale})


def numbers(blocks: Tensor, scales: Tensor) -> Tensor:
    """What a stack stands for, bf16 [experts, K, M]; see :class:`Mxfp4`. One expert at a time becomes plain numbers on
    the way."""
    table = torch.tensor(TABLES["fp4"], dtype=torch.bfloat16)
    experts, rows, groups, half = blocks.shape
    out = torch.empty(experts, rows, groups, half, 2, dtype=torch.bfloat16)
    for expert, (codes, exponents) in enumerate(zip(blocks, scales, strict=True)):
        factors = torch.exp2(exponents.to(torch.float32) - 127)[:, :, None]
        out[expert, ..., 0] = table[(codes & 15).int()] * factors
        out[expert, ..., 1] = table[(codes >> 4).int()] * factors
    return out.view(experts, rows, groups * 2 * half).mT
