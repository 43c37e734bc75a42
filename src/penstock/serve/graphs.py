"""Decoding steps as CUDA graphs: the whole pass is launched at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from penstock.ops.paged.contract import PagedBatch, PagedCache


class Captured(NamedTuple):
    """A graph, and where its input and output lie."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    positions: Tensor
    logits: Tensor


def graph_sizes(sequences: int) -> list[int]:
    """Batch sizes that are captured: dense where the batch is small, in eighths of the size where it is large.

    There is none below 2: a compiled pass treats a batch of one as a case of its own, and two cost the same.
    """
    sizes, size = [], 2
    while size < sequences:
        sizes.append(size)
        size += max(2, 1 << max(size.bit_length() - 3, 0))
    return [*sizes, max(sequences, 2)]


class DecodeGraphs:
    """Graphs of decoding steps for some batch sizes; a batch between two is padded.

    Args:
        logits: the pass: tokens int64 [N] and positions int64 [N] to scores [N, vocabulary].
        cache: the cache that the pass reads and writes; it must be able to :meth:`~PagedCache.fix` its plans.
        sequences: the largest batch.
        pages: most blocks of a sequence.
        padding: a block that belongs to nobody, for the sequences that fill up a batch.
    """

    def __init__(
        self,
        logits: Callable[[Tensor, Tensor], Tensor],
        cache: PagedCache,
        *,
        sequences: int,
        pages: int,
        padding: int,
    ) -> None:
        self._logits, self._cache, self._padding = logits, cache, padding
        self._sizes = graph_sizes(sequences)
        self._captured: dict[int, Captured] = {}
        if not cache.fix(self._sizes, pages):
            raise ValueError("the cache's plans cannot be replayed")

    @property
    def sizes(self) -> list[int]:
        """The sizes to :meth:`capture`."""
        return list(self._sizes)

    @torch.inference_mode()
    def capture(self, size: int) -> None:
        """Captures the pass for batches of ``size``. Largest first: the others then fit in its memory."""
        device = self._cache.shape.device
        tokens = torch.zeros(size, dtype=torch.int64, device=device)
        positions = torch.zeros_like(tokens)
        nobody = torch.zeros(0, dtype=torch.int32)
        self._cache.plan(self._padded(PagedBatch(nobody, nobody, nobody.view(0, 1), nobody.long(), 1), size))
        self._logits(tokens, positions)
        torch.cuda.synchronize(device)
        pool = next(iter(self._captured.values())).graph.pool() if self._captured else None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits = self._logits(tokens, positions)
        self._captured[size] = Captured(graph, tokens, positions, logits)

    def size_for(self, sequences: int) -> int | None:
        """The captured size that a batch of ``sequences`` is padded to, None where there is none."""
        return next((size for size in self._sizes if size >= sequences and size in self._captured), None)

    def replay(self, size: int, tokens: Tensor, positions: Tensor, batch: PagedBatch) -> Tensor:
        """The scores [N, vocabulary] of a decoding step of N <= ``size`` sequences. They lie where the next replay
        puts its own."""
        count = tokens.shape[0]
        captured = self._captured[size]
        self._cache.plan(self._padded(batch, size))
        captured.tokens[:count].copy_(tokens)
        captured.positions[:count].copy_(positions)
        captured.graph.replay()
        return captured.logits[:count]

    def _padded(self, batch: PagedBatch, size: int) -> PagedBatch:
        """``batch`` with sequences of one token in the padding block, up to ``size``."""
        more = size - batch.lengths.shape[0]
        first = self._padding * self._cache.shape.block_size
        tables = np.full((size, batch.tables.shape[1]), self._padding, np.int32)
        tables[: size - more] = batch.tables.numpy()
        return PagedBatch(
            starts=torch.arange(size + 1, dtype=torch.int32),
            lengths=torch.cat([batch.lengths, torch.ones(more, dtype=torch.int32)]),
            tables=torch.from_numpy(tables),
            slots=torch.cat([batch.slots, torch.full((more,), first, dtype=torch.int64)]),
            longest=1,
        )
