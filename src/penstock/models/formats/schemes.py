"""Schemes in which weights are quantized: rounded to nearest, in the formats of compressed-tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from penstock.core.errors import ModelError, UsageError, nearest
from penstock.models.formats.parts import nibbles

#: Columns that share a scale in W4A16; the first that divides the columns of all matrices is taken.
GROUPS = (128, 64, 32)

#: Activations are quantized token by token by whoever computes; nothing has to be calibrated for that.
_TOKENS = {"symmetric": True, "dynamic": True, "strategy": "token"}


class Scheme(Protocol):
    """How the matrices of a model are quantized.

    Attributes:
        format: what compressed-tensors calls the files.
    """

    format: str

    def weights(self) -> dict[str, Any]:
        """What compressed-tensors calls the quantization of the weights."""

    def activations(self) -> dict[str, Any] | None:
        """And that of what they are multiplied with, None where it stays as it is."""

    def compress(self, matrix: Tensor) -> dict[str, Tensor]:
        """The tensors in place of ``weight`` [M, K], by what they are called; scales are in its dtype."""


class Fp8:
    """W8A8 in floating point: e4m3, a scale for each row."""

    format = "float-quantized"

    def __init__(self, columns: Collection[int]) -> None:
        """Any number of ``columns`` will do."""

    def weights(self) -> dict[str, Any]:
        return {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}

    def activations(self) -> dict[str, Any] | None:
        return {"num_bits": 8, "type": "float", **_TOKENS}

    def compress(self, matrix: Tensor) -> dict[str, Tensor]:
        most = torch.finfo(torch.float8_e4m3fn).max
        scale = _scale(matrix.float().abs().amax(1, keepdim=True), most, matrix.dtype)
        values = (matrix.float() / scale.float()).clamp(-most, most).to(torch.float8_e4m3fn)
        return {"weight": values, "weight_scale": scale}


class Int8:
    """W8A8 in integers: a scale for each row."""

    format = "int-quantized"

    def __init__(self, columns: Collection[int]) -> None:
        """Any number of ``columns`` will do."""

    def weights(self) -> dict[str, Any]:
        return {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}

    def activations(self) -> dict[str, Any] | None:
        return {"num_bits": 8, "type": "int", **_TOKENS}

    def compress(self, matrix: Tensor) -> dict[str, Tensor]:
        scale = _scale(matrix.float().abs().amax(1, keepdim=True), 127, matrix.dtype)
        values = (matrix.float() / scale.float()).round().clamp(-128, 127).to(torch.int8)
        return {"weight": values, "weight_scale": scale}


class W4A16:
    """Integers of 4 bits, a scale for each group of columns; activations stay as they are.

    Raises:
        ModelError: no size of groups divides all ``columns``.
    """

    format = "pack-quantized"

    def __init__(self, columns: Collection[int]) -> None:
        fitting = [size for size in GROUPS if not any(count % size for count in columns)]
        if not fitting:
            unfit = {count for count in columns if count % min(GROUPS)}  # each size is a multiple of the smallest
            raise ModelError(
                f"matrices of {', '.join(map(str, sorted(unfit)))} columns have no groups of "
                f"{', '.join(map(str, GROUPS))}",
                hint="Choose another scheme: fp8 or int8.",
            )
        self.group = fitting[0]

    def weights(self) -> dict[str, Any]:
        shared = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False}
        return {**shared, "strategy": "group", "group_size": self.group}

    def activations(self) -> dict[str, Any] | None:
        return None

    def compress(self, matrix: Tensor) -> dict[str, Tensor]:
        rows, columns = matrix.shape
        grouped = matrix.float().view(rows, -1, self.group)
        # From -8 to 7: the middle of both ends, so that neither is cut off by more than half a step.
        scale = _scale(grouped.abs().amax(-1), 7.5, matrix.dtype)
        values = (grouped / scale.float().unsqueeze(-1)).round().clamp(-8, 7).to(torch.int8).view(rows, columns)
        packed = nibbles((values + 8).to(torch.uint8)).view(torch.int32)
        return {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor([rows, columns])}


SCHEMES: Mapping[str, type[Fp8] | type[Int8] | type[W4A16]] = {"fp8": Fp8, "w4a16": W4A16, "int8": Int8}


def scheme_of(name: str, columns: Collection[int]) -> Scheme:
    """The scheme called ``name``, for matrices with these numbers of ``columns``.

    Raises:
        UsageError: there is none of that name.
        ModelError: it cannot be used for such matrices.
    """
    if name not in SCHEMES:
        raise UsageError(f"there is no scheme {name!r}: {nearest(name, SCHEMES)}")
    return SCHEMES[name](columns)


def described(scheme: Scheme, kept: Collection[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a config.json, for a model whose linear layers ``kept`` are not quantized."""
    group = {
        "targets": ["Linear"],
        "weights": scheme.weights(),
        "input_activations": scheme.activations(),
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": scheme.format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": sorted(kept),
    }


def _scale(largest: Tensor, most: float, dtype: torch.dtype) -> Tensor:
    """What takes ``largest`` to ``most``, in ``dtype``; one where all is zero."""
    scale = (largest / most).to(dtype)
    return torch.where(scale == 0, 1, scale)
