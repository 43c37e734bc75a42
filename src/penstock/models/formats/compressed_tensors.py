"""What the package compressed-tensors writes, which transformers reads."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from penstock.core.errors import ModelError
from penstock.models.formats.contract import Stored
from penstock.models.formats.parts import pairs, part, scales, unpacked
from penstock.ops.quantized.codebook import Codebook4
from penstock.ops.quantized.contract import Packed
from penstock.ops.quantized.fp8 import Fp8
from penstock.ops.quantized.integers import Int4, Int8

FORMATS = ("float-quantized", "int-quantized", "pack-quantized", "naive-quantized", "mxfp4-pack-quantized")


class CompressedTensors:
    """The formats of compressed-tensors: 8-bit floating point and integers as such (``float-quantized``,
    ``int-quantized``), integers of up to 8 bits in int32 words (``pack-quantized``), and MXFP4. Matrices have a scale,
    or each row, group of columns, or block has one.

    Activations are quantized by whoever computes, with scales of their own: of what a scheme says about them, what
    counts is whether they are to be e4m3.
    """

    markers: Collection[str] = ("weight_scale",)
    suffixes: Collection[str] = ("weight", "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx")

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._groups = list(config["config_groups"].values())
        named = [config.get("format"), *(group.get("format") for group in self._groups)]
        unknown = {name for name in named if name not in (None, "mixed-precision", *FORMATS)}
        if unknown or (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
            raise ModelError(
                f"weights of the format {', '.join(sorted(unknown)) or 'sparse'} are not supported",
                hint=f"Formats: {', '.join(FORMATS)}.",
            )

    def shape(self, headers: Mapping[str, Stored]) -> tuple[int, int]:
        if "weight" in headers:
            rows, columns = headers["weight"].shape
            return rows, columns
        if "weight_packed" not in headers:
            return -1, -1
        rows, size = headers["weight_packed"].shape
        if headers["weight_packed"].dtype == "U8":
            return rows, 2 * size
        return rows, -1  # the words of a row may be longer than what it holds

    def pack(self, module: str, tensors: Mapping[str, Tensor]) -> Packed:
        whole = self._scheme(module)
        scheme, scale = whole["weights"], part(module, tensors, "weight_scale")
        if "weight_g_idx" in tensors:
            raise ModelError(
                f"{module} has its columns in an order of their own (weight_g_idx), which is not supported"
            )
        if not scale.is_floating_point() and scheme.get("type") != "float":
            raise ModelError(f"the scales of {module} are {scale.dtype}, and no real numbers")
        if "weight_packed" not in tensors:
            values = part(module, tensors, "weight")
            shape = (values.shape[0], values.shape[1])
            group, block = _block(scheme, shape)
            factors = scales(module, scale, shape, block)
            if values.dtype == torch.float8_e4m3fn:
                given = whole.get("input_activations") or {}
                rounds = given.get("type") == "float" and given.get("num_bits") == 8
                return Packed(Fp8(group=group, rounds=rounds), {"values": values, "scale": factors})
            if values.dtype != torch.int8:
                raise ModelError(f"the weight of {module} is {values.dtype}, which is none that has scales")
            zeros = tensors.get("weight_zero_point")
            zeros = None if zeros is None else scales(module, zeros, shape, block)
            return Packed(Int8(group=group), {"values": values, **_affine(factors, zeros)})
        packed = tensors["weight_packed"]
        if packed.dtype == torch.uint8:
            factors = scales(module, (scale.float() - 127).exp2(), (packed.shape[0], packed.shape[1] * 2), (1, 32))
            return Packed(Codebook4(table="fp4", group=32), {"values": packed, "scale": factors})
        return self._integers(module, scheme, packed, scale, tensors)

    def _integers(
        self, module: str, scheme: Mapping[str, Any], packed: Tensor, scale: Tensor, tensors: Mapping[str, Tensor]
    ) -> Packed:
        """Integers in words, with half their range added to them."""
        bits = int(scheme["num_bits"])
        rows, columns = part(module, tensors, "weight_shape").tolist()
        if packed.shape[0] != rows or packed.shape[1] < -(-columns * bits // 32):
            raise ModelError(f"weight_packed of {module} is {list(packed.shape)}, too small for {rows} x {columns}")
        group, block = _block(scheme, (rows, columns))
        factors, zeros = scales(module, scale, (rows, columns), block), None
        if not scheme.get("symmetric", True):
            words = part(module, tensors, "weight_zero_point")
            zeros = unpacked(words.T, bits, rows).T.float() - 2 ** (bits - 1)
        if bits == 4 and columns % 2 == 0:
            return Packed(Int4(group=group), {"values": pairs(packed, columns), **_affine(factors, zeros)})
        values = unpacked(packed, bits, columns)
        signed = (values.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
        return Packed(Int8(group=group), {"values": signed, **_affine(factors, zeros)})

    def _scheme(self, module: str) -> Mapping[str, Any]:
        """The scheme of ``module``: that of the first group that names it, or all linear layers."""
        for group in self._groups:
            for target in group["targets"]:
                if target in ("Linear", module) or (target.startswith("re:") and re.match(target[3:], module)):
                    scheme: Mapping[str, Any] = group
                    return scheme
        raise ModelError(f"{module} is quantized, and no group of the quantization_config is for it")


def _block(scheme: Mapping[str, Any], shape: tuple[int, int]) -> tuple[int | None, tuple[int, int]]:
    """The columns of a group (None: all of them), and the rows and columns that share a scale."""
    strategy = scheme["strategy"]
    if strategy == "block":
        rows, columns = scheme["block_structure"]
        return columns, (rows, columns)
    if strategy == "group":
        return scheme["group_size"], (1, scheme["group_size"])
    if strategy in ("channel", "tensor"):
        return None, (1 if strategy == "channel" else shape[0], shape[1])
    raise ModelError(f"weights quantized by {strategy!r} are not supported")


def _affine(scale: Tensor, zeros: Tensor | None) -> dict[str, Tensor]:
    """``scale``, and the offset that takes ``zeros`` to zero."""
    return {"scale": scale} if zeros is None else {"scale": scale, "offset": -scale * zeros}
