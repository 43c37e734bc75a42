"""The newest tokens of sequences in full precision, beside a cache that is coded.

A sequence is cut into windows of so many places, counted from its beginning, or from where its cache was compressed
last. A token reads those of its own window, itself among them, as the model computed them, and all before as the codec
has them in their blocks. So the newest tokens stay in full precision until a window is full; then all of it is read as
it is coded, and the next one begins, as in KIVI (Liu et al., 2024). What a token reads follows from its place alone.
Who goes on from blocks that others computed does so from the beginning of a window, and needs no more than the blocks.

The windows lie in rings, one for each sequence that runs, and not in blocks. The code of a token is a function of its
key and value alone, so it is written to its block at once: what leaves a window is there already.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from penstock.core import pages

if TYPE_CHECKING:
    from penstock.ops.paged.contract import CacheShape, PagedBatch


@dataclasses.dataclass(frozen=True)
class Residual:
    """Windows in full precision.

    Attributes:
        tokens: of a window, whole blocks.
        rings: how many sequences have one at a time.
        tentative: most tokens of a sequence that may be computed for nothing, in whole blocks: those of the window
            before them are still in the ring then.
    """

    tokens: int
    rings: int
    tentative: int = 0

    @property
    def places(self) -> int:
        """Tokens of a ring: that of place p lies at p modulo these."""
        return self.tokens + self.tentative

    def begin(self, place: int, since: int = 0) -> int:
        """Where the window begins of a token at ``place``, of a sequence whose windows begin no sooner than ``since``,
        where its cache was compressed."""
        return max(since, place - place % self.tokens)

    def runs(self, first: int, end: int, since: int) -> Iterator[tuple[int, int, int]]:
        """Places from ``first`` up to ``end`` in pieces of one window each: where that begins, and the piece."""
        while first < end:
            behind = min(end, first - first % self.tokens + self.tokens)
            yield self.begin(first, since), first, behind
            first = behind


class Rings:
    """The memory of windows: [layers, parts, rings, places, K, D], in the dtype of ``shape``."""

    def __init__(self, shape: CacheShape) -> None:
        residual = shape.residual
        assert residual is not None
        self._places = residual.places
        sizes = (shape.layers, shape.parts, residual.rings, residual.places, shape.kv_heads, shape.head_dim)
        self.memory = pages.zeros(sizes, shape.dtype, shape.device)

    def read(self, layer: int, part: int, ring: int, first: int, end: int) -> Tensor:
        """The keys (0) or values (1) [n, K, D] of the tokens at the places from ``first`` up to ``end``."""
        places = torch.arange(first, end, device=self.memory.device) % self._places
        return self.memory[layer, part, ring, places]

    def plan(self, batch: PagedBatch) -> None:
        """What is written next are the new tokens of ``batch``, the last ones where not all have a place."""
        rows, places = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
        starts, lengths = batch.starts.tolist(), batch.lengths.tolist()
        for index, ring in enumerate([] if batch.rings is None else batch.rings.tolist()):
            count = min(starts[index + 1] - starts[index], self._places)
            rows.append(torch.arange(starts[index + 1] - count, starts[index + 1]))
            own = torch.arange(lengths[index] - count, lengths[index])
            places.append(ring * self._places + own % self._places)
        self._rows, self._where = (torch.cat(each).to(self.memory.device) for each in (rows, places))

    def write(self, layer: int, part: int, vectors: Tensor) -> None:
        """Keeps the planned ones of ``vectors`` [N, K, D]."""
        self.memory[layer, part].flatten(0, 1)[self._where] = vectors[self._rows].to(self.memory.dtype)
