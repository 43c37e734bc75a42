"""The contract ``weight.format``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from penstock.core.errors import UsageError
from penstock.policy import Policy, contract, unwritten

#: The tensors that a format stores a matrix in, by its own names; the first dimension of each counts the matrix's rows.
Parts = Mapping[str, Tensor]

#: Numbers of a matrix that are dequantized at a time where there is no kernel.
PIECE = 1 << 22


class Example(NamedTuple):
    """A matrix in a format: its ``parts``, and the ``matrix`` that they stand for, worked out number by number."""

    format: WeightFormat
    parts: Parts
    matrix: list[list[float]]


@contract(
    "weight.format",
    law="a stored matrix stands for the numbers that the format's definition gives, also where it is arranged for "
    "products; rows can be cut from it and looked up, and columns cut between its units; a product with it is "
    "that with these numbers, within the rounding that the format states, and on a CPU models compute with it as "
    "it is stored: layers, experts, and a head and an embedding that share one matrix; the gradient of its input "
    "is that of a product with these numbers, and nothing is kept for it",
)
class WeightFormat(Policy):
    """A way to store a matrix of weights [M, K] in few bits.

    A policy gives :meth:`shape` and :meth:`dequantize`, and :meth:`example` for its law; a :meth:`product` of its own
    where there is a kernel that reads the parts as they are, and what it :meth:`computes` on, where that is not a CPU
    alone.
    """

    def shape(self, parts: Parts) -> tuple[int, int]:
        """The rows and columns of the matrix."""
        raise NotImplementedError

    def dequantize(self, parts: Parts) -> Tensor:
        """The matrix, float32 [M, K]."""
        raise NotImplementedError

    def product(self, x: Tensor, parts: Parts) -> Tensor:
        """``x`` [N, K] times the transpose of the matrix: [N, M], in the dtype of ``x``.

        Without a kernel, some rows of the matrix are dequantized at a time.
        """
        out = x.new_empty(x.shape[0], self.shape(parts)[0])
        for rows, piece in self._in_pieces(parts):
            out[:, rows] = F.linear(x, piece.to(x.dtype))
        return out

    def grouped_product(self, x: Tensor, parts: Parts, ends: Tensor) -> Tensor | None:
        """Rows of ``x`` [N, K], sorted by expert, each times the transpose of its expert's matrix: [N, M], in the dtype
        of ``x``, by a kernel that computes all at once, and waits for nothing; None where there is none. ``parts`` are
        of the matrices of all experts one below the other, and ``ends`` int32 [E] says where the rows of each end."""
        return None

    def input_gradient(self, gradient: Tensor, parts: Parts) -> Tensor:
        """The gradient of ``x`` in :meth:`product`, of that of its result, ``gradient`` [N, M]: [N, K], which is
        ``gradient`` times the matrix, in its dtype. Some rows of the matrix are dequantized at a time; their sums are
        not rounded below float32 before the end."""
        exact = torch.promote_types(gradient.dtype, torch.float32)
        out = gradient.new_zeros(gradient.shape[0], self.shape(parts)[1], dtype=exact)
        for rows, piece in self._in_pieces(parts):
            out += gradient[:, rows] @ piece.to(gradient.dtype)
        return out.to(gradient.dtype)

    def _in_pieces(self, parts: Parts) -> Iterator[tuple[slice, Tensor]]:
        """The dequantized matrix, some rows at a time, with which those are."""
        rows, columns = self.shape(parts)
        step = max(1, PIECE // columns)
        for start in range(0, rows, step):
            yield slice(start, start + step), self.dequantize(cut(parts, start, start + step))

    def computes(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a model on ``device``, with activations of this ``dtype``, is to have matrices in the format as they
        are stored; elsewhere, it has plain numbers in their place."""
        return device.type == "cpu"

    def dequantizes(self, device: torch.device) -> bool:
        """Whether a matrix on ``device`` is dequantized there, without copies to the host and back."""
        return True

    def arranged(self, parts: Parts) -> Parts:
        """Parts of the same names that stand for the same matrix, with the strides and in the order in which a
        :meth:`product` on their device reads them fastest; all methods take them as they come, too. Whoever keeps a
        matrix asks once."""
        return parts

    def exact(self) -> WeightFormat:
        """The format whose :meth:`product` does not round ``x``, and which is like this one but for that."""
        return self

    @property
    def unit(self) -> int:
        """Columns that are stored together, so that a matrix can be cut between them only."""
        return 1

    def columns(self, parts: Parts, start: int, stop: int) -> Parts:
        """The parts of the columns from ``start`` to ``stop``, as views.

        Raises:
            UsageError: they would cut a unit.
        """
        columns, unit = self.shape(parts)[1], self.unit
        if start % unit or (stop % unit and stop != columns):
            raise UsageError(f"{unit} columns are stored together, and columns {start} to {stop} would cut some in two")
        units = -(-columns // unit)

        def cut_columns(part: Tensor) -> Tensor:
            each = -(-part.shape[1] // units)
            whole = units > 1 and part.shape[1] == 1  # one number for a whole row
            return part if whole else part[:, start // unit * each : None if stop == columns else stop // unit * each]

        return {name: cut_columns(part) for name, part in parts.items()}

    def rounding(self, x: Tensor, parts: Parts) -> Tensor:
        """The most that :meth:`product` may differ from that with the dequantized matrix, for each of its numbers,
        beyond what sums in another order differ by: none, unless its kernel rounds ``x``."""
        return torch.zeros(())

    @classmethod
    def example(cls) -> Example:
        """A matrix of at least three rows for the law."""
        raise unwritten(cls, "example()", "give parts, and the numbers that they stand for")


@dataclasses.dataclass(frozen=True)
class Packed:
    """A matrix in a format.

    Attributes:
        format: how it is stored.
        parts: its tensors.
    """

    format: WeightFormat
    parts: Parts

    @property
    def shape(self) -> tuple[int, int]:
        return self.format.shape(self.parts)

    def dequantize(self) -> Tensor:
        """The matrix, float32 [M, K]."""
        return self.format.dequantize(self.parts)

    def rows(self, indices: Tensor) -> Tensor:
        """The rows at ``indices``, integers [N]: float32 [N, K]."""
        return self.format.dequantize({name: _taken(part, indices) for name, part in self.parts.items()})

    def product(self, x: Tensor) -> Tensor:
        """``x`` [N, K] times the transpose of the matrix: [N, M], in the dtype of ``x``, which gets a gradient where it
        wants one. The matrix has none, and is not kept for that of ``x``, but dequantized once more."""
        if torch.is_grad_enabled() and x.requires_grad:
            found: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
            return found
        return self.format.product(x, self.parts)


@dataclasses.dataclass(frozen=True)
class PackedStack:
    """As many matrices [M, K] as there are experts.

    Attributes:
        pieces: the rows of the first, then those of the second, and so on: [count * M, K] together.
        count: of the matrices.
    """

    pieces: Sequence[Packed]
    count: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """[count, M, K]."""
        return self.count, sum(piece.shape[0] for piece in self.pieces) // self.count, self.pieces[0].shape[1]

    def product(self, x: Tensor, ends: Tensor) -> Tensor:
        """Rows of ``x`` [N, K], sorted by expert, each times the transpose of its expert's matrix: [N, M], in the dtype
        of ``x``, which gets a gradient where it wants one. The rows of each expert end at ``ends``, int32 [count]; the
        matrices of those without rows are not read."""
        if len(self.pieces) == 1 and not (torch.is_grad_enabled() and x.requires_grad):
            (piece,) = self.pieces
            found = piece.format.grouped_product(x, piece.parts, ends)
            if found is not None:
                return found
        stops = ends.tolist()
        groups = [(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
        products = [self._of(x[start:stop], expert) for expert, (start, stop) in enumerate(groups) if start < stop]
        return torch.cat(products) if products else x.new_empty(0, self.shape[1])

    def _of(self, x: Tensor, number: int) -> Tensor:
        """``x`` [N, K] times the transpose of the matrix at ``number``: [N, M]."""
        rows, start, found = self.shape[1], 0, list[Tensor]()
        for piece in self.pieces:
            first, last = (min(max(at - start, 0), piece.shape[0]) for at in (number * rows, (number + 1) * rows))
            if first < last:
                found.append(Packed(piece.format, cut(piece.parts, first, last)).product(x))
            start += piece.shape[0]
        return found[0] if len(found) == 1 else torch.cat(found, -1)


class _Product(torch.autograd.Function):
    """:meth:`Packed.product`, with a gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Packed) -> Tensor:
        ctx.packed = packed
        return packed.format.product(x, packed.parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.packed.format.input_gradient(gradient, ctx.packed.parts), None


def cut(parts: Parts, start: int, stop: int) -> Parts:
    """The parts of the rows from ``start`` to ``stop``, as views."""
    return {name: part[start:stop] for name, part in parts.items()}


def _taken(part: Tensor, indices: Tensor) -> Tensor:
    """The rows of ``part`` at ``indices``; those of e4m3, which devices do not index, by their bytes."""
    if part.dtype == torch.float8_e4m3fn:
        return part.view(torch.uint8)[indices].view(part.dtype)
    return part[indices]


def spread(groups: Tensor, columns: int, size: int | None) -> Tensor:
    """``groups`` [M, k], a number for each ``size`` columns (None: for the whole row), as float32 [M, columns]."""
    whole = groups.float().repeat_interleave(columns if size is None else size, 1)
    return whole[:, :columns]
