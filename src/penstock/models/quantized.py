"""Layers whose weights stay in the format that they are stored in."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.models.linear import Linear
from penstock.ops.quantized.contract import Packed, PackedStack, WeightFormat


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

    def stored(self) -> list[Packed]:
        """The same for a product: to torch.compile, only what it finds as a buffer has a shape that stays."""
        return self._assembled() if torch.compiler.is_compiling() else self.pieces()

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

    def rows(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of the matrix at ``indices``, integers [*T]: [*T, K]. No other rows are decoded.

        Raises:
            IndexError: there is no such row.
        """
        first, *others = self.stored()
        places, start = indices.flatten(), first.shape[0]
        found = first.rows(places.clamp(max=start - 1) if others else places).to(dtype)
        for number, piece in enumerate(others, 1):
            within = (places - start).clamp(min=0)
            start += piece.shape[0]
            own = piece.rows(within if number == len(others) else within.clamp(max=piece.shape[0] - 1))
            found = torch.where((places >= start - piece.shape[0]).unsqueeze(-1), own.to(dtype), found)
        return found.view(*indices.shape, found.shape[-1])

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
        found = [piece.product(flat) for piece in self.stored()]
        out = found[0] if len(found) == 1 else torch.cat(found, -1)
        out = out if self.bias is None else out + self.bias.to(out.dtype)
        return out.view(*x.shape[:-1], out.shape[-1])


class QuantizedEmbedding(nn.Module):
    """An embedding whose matrix stays as it is stored: of the rows that are looked up, and of no others, plain numbers
    are made.

    Args:
        matrix: whose rows they are; a tied head is the same layer.
        dtype: that of the rows which come out, until the module is moved to another.
    """

    def __init__(self, matrix: QuantizedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix = matrix
        self.num_embeddings = matrix.out_features
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        like: Tensor = self.get_buffer("like")
        return self.matrix.rows(tokens, like.dtype)


class QuantizedExperts(nn.Module):
    """A matrix for each of some experts, stored as the rows of one: those of an expert below those of the one before.

    Args:
        matrix: of all of them, [E * M, K].
        count: how many experts there are.
    """

    def __init__(self, matrix: QuantizedLinear, count: int) -> None:
        super().__init__()
        self.matrix, self.count = matrix, count

    def dequantize(self) -> Tensor:
        """The matrices, float32 [E, M, K]."""
        return self.matrix.dequantize().view(self.count, -1, self.matrix.in_features)

    def stack(self) -> PackedStack:
        """The matrices for products with those that are chosen."""
        return PackedStack(self.matrix.stored(), self.count)


def rows_of(layer: Linear | QuantizedLinear, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows of a layer's matrix at ``indices``, integers [*T]: [*T, K] in ``dtype``."""
    if isinstance(layer, QuantizedLinear):
        return layer.rows(indices, dtype)
    return F.embedding(indices, layer.weight).to(dtype)


def packed_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """The layers of ``model`` whose matrices stay as they are stored, by their names."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield name, module


def plain_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """What the matrices of ``model`` stand for that stay as they are stored, one at a time, by the names that they have
    as parameters where they are plain."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedExperts):
            yield name, module.dequantize().to(dtype)
        elif isinstance(module, QuantizedLinear) and not isinstance(_owner(model, name), QuantizedExperts):
            layer = name.removesuffix(".packed" if name.endswith(".packed") else ".matrix")
            yield f"{layer}.weight", module.dequantize().to(dtype)


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])
