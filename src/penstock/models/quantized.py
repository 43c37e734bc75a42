"""Linear layers whose weights stay in the format that they are stored in."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from penstock.ops.quantized.contract import Packed, WeightFormat


class QuantizedLinear(nn.Module):
    """A linear layer, for inference alone, whose matrix is stored in pieces: some rows each, in whichever formats.

    Args:
        pieces: from the first rows on. Neighbours of one format are joined.
        bias: [M], or None.
    """

    def __init__(self, pieces: Sequence[Packed], bias: nn.Parameter | None) -> None:
        super().__init__()
        self._formats: list[tuple[WeightFormat, list[str]]] = []
        self._pieces: list[Packed] | None = None
        for number, (format, same) in enumerate(itertools.groupby(pieces, key=lambda piece: piece.format)):
            parts = [piece.parts for piece in same]
            self._formats.append((format, sorted(parts[0])))
            for name in parts[0]:
                joined = torch.cat([each[name] for each in parts]) if len(parts) > 1 else parts[0][name]
                self.register_buffer(f"{name}_{number}", joined, persistent=False)
        self.bias = bias

    def pieces(self) -> list[Packed]:
        """The matrix, from the first rows on."""
        if self._pieces is None:  # which a small model would spend more time on than on their products
            self._pieces = self._assembled()
        return self._pieces

    def _assembled(self) -> list[Packed]:
        return [
            Packed(format, {name: getattr(self, f"{name}_{number}") for name in names})
            for number, (format, names) in enumerate(self._formats)
        ]

    def _apply(self, *given: Any, **options: Any) -> Self:
        """Buffers move."""
        self._pieces = None
        moved: Self = super()._apply(*given, **options)  # type: ignore[no-untyped-call]
        return moved

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        # To torch.compile only what it finds as a buffer has a shape that stays.
        pieces = self._assembled() if torch.compiler.is_compiling() else self.pieces()
        found = [piece.format.product(flat, piece.parts) for piece in pieces]
        out = found[0] if len(found) == 1 else torch.cat(found, -1)
        out = out if self.bias is None else out + self.bias
        return out.view(*x.shape[:-1], out.shape[-1])
