"""Linear layers whose weights stay in the format that they are stored in."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from penstock.ops.quantized.contract import Packed, WeightFormat


class QuantizedLinear(nn.Module):
    """A linear layer whose matrix is stored in pieces: some rows each, in whichever formats. Gradients go through it,
    and stop at the matrix, which is not trained; nothing changes the dtypes that it is stored in.

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
        self._arrange()

    def pieces(self) -> list[Packed]:
        """The matrix, from the first rows on."""
        if self._pieces is None:  # which a small model would spend more time on than on their products
            self._pieces = self._assembled()
        return self._pieces

    def _arrange(self) -> None:
        """Parts have the strides that products want on the device where they are."""
        for number, piece in enumerate(self._assembled()):
            for name, part in piece.format.arranged(piece.parts).items():
                setattr(self, f"{name}_{number}", part)

    def _assembled(self) -> list[Packed]:
        return [
            Packed(format, {name: getattr(self, f"{name}_{number}") for name in names})
            for number, (format, names) in enumerate(self._formats)
        ]

    @property
    def in_features(self) -> int:
        return self.pieces()[0].shape[1]

    @property
    def out_features(self) -> int:
        return sum(piece.shape[0] for piece in self.pieces())

    def dequantize(self) -> Tensor:
        """The matrix, float32 [M, K]."""
        return torch.cat([piece.dequantize() for piece in self.pieces()])

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Buffers move, and keep their dtypes: in others they would stand for other numbers."""
        self._pieces = None
        stored = {id(buffer) for buffer in self.buffers()}

        def moved(tensor: Tensor) -> Tensor:
            found = function(tensor)
            return tensor.to(found.device) if id(tensor) in stored and found.dtype != tensor.dtype else found

        same: Self = super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        self._arrange()
        return same

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        flat = x.reshape(-1, x.shape[-1])
        # To torch.compile only what it finds as a buffer has a shape that stays.
        pieces = self._assembled() if torch.compiler.is_compiling() else self.pieces()
        found = [piece.product(flat) for piece in pieces]
        out = found[0] if len(found) == 1 else torch.cat(found, -1)
        out = out if self.bias is None else out + self.bias.to(out.dtype)
        return out.view(*x.shape[:-1], out.shape[-1])


def packed_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """The layers of ``model`` whose matrices stay as they are stored, by their names."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield name, module
