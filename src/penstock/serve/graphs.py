"""Steps as CUDA graphs: the whole pass is launched at once."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from penstock.ops.paged.contract import PagedBatch, PagedCache, StepShape

#: New tokens of prompts that steps are captured for, and how many sequences have them; one of those takes what a step
#: leaves over. Where there are more tokens, computing them takes longer than launching kernels one by one.
PROMPT_TOKENS = (64, 128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048)
PROMPTS = 8
#: Sequences that decode beside them, in the same steps.
BESIDE = (8, 32, 64, 128, 192, 256, 384, 512, 768)


def decode_shapes(sequences: int) -> list[StepShape]:
    """Batches of up to ``sequences`` that decode: dense where few do, a quarter apart at most where many do.

    There is none below 2: a compiled pass treats a batch of one as a case of its own, and two cost the same.
    """
    sizes, size = [], 2
    while size < sequences:
        sizes.append(size)
        size += max(2, 1 << max(size.bit_length() - 3, 0))
    return [StepShape(size) for size in (*sizes, max(sequences, 2))]


def prompt_shapes(sequences: int, tokens: int) -> list[StepShape]:
    """Batches of up to ``sequences`` that decode, beside some prompts with up to ``tokens`` tokens."""
    sizes = [*(size for size in BESIDE if size < sequences), sequences]
    lengths = PROMPT_TOKENS[: bisect_left(PROMPT_TOKENS, tokens) + 1]
    return [StepShape(size, PROMPTS, length) for length in lengths for size in sizes]


class Captured(NamedTuple):
    """A graph, and where its input and output lie."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    positions: Tensor
    output: Any


class StepGraphs:
    """Graphs of a pass for batches of some shapes; a batch between two is padded.

    Args:
        run: the pass: tokens int64 [N] and positions int64 [N] to tensors.
        shapes: to :meth:`capture`.
        cache: the cache that the pass reads and writes; it must be able to :meth:`~PagedCache.fix` its plans.
        pages: most blocks of a sequence.
        padding: a block that belongs to nobody, for the sequences that fill up a batch.
        pool: memory that graphs share: one at a time is replayed.
    """

    def __init__(
        self,
        run: Callable[[Tensor, Tensor], Any],
        shapes: list[StepShape],
        cache: PagedCache,
        *,
        pages: int,
        padding: int,
        pool: Any = None,
    ) -> None:
        self._run, self._cache, self._padding, self._pool = run, cache, padding, pool
        self.shapes = shapes
        self._captured: dict[StepShape, Captured] = {}
        if not cache.fix(shapes, pages):
            raise ValueError("the cache's plans cannot be replayed")

    @torch.inference_mode()
    def capture(self, shape: StepShape) -> None:
        """Captures the pass for batches of ``shape``. Largest first: the others then fit in its memory."""
        device = self._cache.shape.device
        tokens = torch.zeros(shape.rows, dtype=torch.int64, device=device)
        positions = torch.zeros_like(tokens)
        nobody = torch.zeros(0, dtype=torch.int32)
        empty = PagedBatch(torch.zeros(1, dtype=torch.int32), nobody, nobody.view(0, 1), nobody.long(), 1)
        self._cache.plan(self.padded(empty, shape))
        self._run(tokens, positions)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = self._run(tokens, positions)
        self._captured[shape] = Captured(graph, tokens, positions, output)

    def shape_for(self, batch: PagedBatch) -> StepShape | None:
        """The smallest captured shape that ``batch`` can be padded to, None where there is none."""
        own = StepShape.of(batch)
        fitting = (shape for shape in self._captured if own.fits(shape))
        return min(fitting, key=lambda shape: shape.rows, default=None)

    def replay(self, shape: StepShape, tokens: Tensor, positions: Tensor, batch: PagedBatch) -> tuple[Any, np.ndarray]:
        """What the pass gives for ``batch``, padded to ``shape``, and the row of each of its N tokens in it. It lies
        where the next replay puts its own."""
        captured, own = self._captured[shape], StepShape.of(batch)
        self._cache.plan(self.padded(batch, shape))
        for target, source in ((captured.tokens, tokens), (captured.positions, positions)):
            target[: own.singles].copy_(source[: own.singles])
            target[shape.singles : shape.singles + own.tokens].copy_(source[own.singles :])
        captured.graph.replay()
        rows = np.arange(own.rows)
        rows[own.singles :] += shape.singles - own.singles
        return captured.output, rows

    def padded(self, batch: PagedBatch, shape: StepShape) -> PagedBatch:
        """``batch`` with sequences in the padding block up to ``shape``: behind those with one new token each, and
        behind the others, where the last has what is left."""
        own = StepShape.of(batch)
        singles, others = shape.singles - own.singles, shape.others - own.others
        more = np.ones(others, np.int32)
        more[-1:] = shape.tokens - own.tokens - max(others - 1, 0)
        fill = [np.ones(singles, np.int32), more]
        counts = _woven(np.diff(batch.starts.numpy()), fill, own.singles)
        lengths = _woven(batch.lengths.numpy(), fill, own.singles)
        size = self._cache.shape.block_size
        width = max(batch.tables.shape[1], -(-int(more.max(initial=1)) // size))
        tables = np.full((len(counts), width), self._padding, np.int32)
        tables[: own.singles, : batch.tables.shape[1]] = batch.tables.numpy()[: own.singles]
        behind = slice(shape.singles, shape.singles + own.others)
        tables[behind, : batch.tables.shape[1]] = batch.tables.numpy()[own.singles :]
        nowhere = [np.full(int(each.sum()), self._padding * size, np.int64) for each in fill]
        return PagedBatch(
            starts=torch.from_numpy(np.concatenate([[0], counts.cumsum()]).astype(np.int32)),
            lengths=torch.from_numpy(lengths),
            tables=torch.from_numpy(tables),
            slots=torch.from_numpy(_woven(batch.slots.numpy(), nowhere, own.singles)),
            longest=int(counts.max()),
            shape=shape,
        )


def _woven(own: np.ndarray, fill: list[np.ndarray], singles: int) -> np.ndarray:
    """``own`` with the first ``fill`` behind its first ``singles``, and the second at the end."""
    return np.concatenate([own[:singles], fill[0], own[singles:], fill[1]])
