"""Steps as CUDA graphs: the whole pass is launched at once."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from bisect import bisect_left
from collections.abc import Callable, Collection
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from penstock.core.devices import CapturedTooEarlyError, pinned
from penstock.core.progress import Bar
from penstock.ops.paged.contract import PagedBatch, PagedCache, StepShape

#: New tokens of prompts that steps are captured for, and how many sequences have them; one of those takes what a step
#: leaves over.
PROMPT_TOKENS = (64, 128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048)
PROMPTS = 8
#: Sequences that decode beside them, in the same steps.
BESIDE = (8, 32, 64, 128, 192, 256, 384, 512, 768)
#: Of how many lengths windows are at most, each half as long as the one before.
LENGTHS = 5
#: How much longer than the host takes to queue a step the device may compute it, for a graph to be worth its padding:
#: the host has more to do in a step than to queue it.
SLACK = 1.2
#: How far apart the steps are, in rows, that are timed: what a graph gains or loses within that is little.
APART = 2**0.5
#: How often each of them is timed.
ROUNDS = 11
#: Graphs that are captured to see how much memory all of them take.
TRIED = 3


def decode_shapes(sequences: int, fewest: int = 2) -> list[StepShape]:
    """Batches of up to ``sequences`` that decode: dense where few do, a quarter apart at most where many do.

    A compiled pass treats a batch of one as a case of its own, so there is one for it only where a second row costs
    more, as it does where it needs other weights.
    """
    sizes, size = [size for size in range(fewest, 2) if size < sequences], 2
    while size < sequences:
        sizes.append(size)
        size += max(2, 1 << max(size.bit_length() - 3, 0))
    return [StepShape(size) for size in (*sizes, max(sequences, fewest))]


def prompt_shapes(sequences: int, tokens: int) -> list[StepShape]:
    """Batches of up to ``sequences`` that decode, beside some prompts with up to ``tokens`` tokens."""
    sizes = [*(size for size in BESIDE if size < sequences), sequences]
    lengths = PROMPT_TOKENS[: bisect_left(PROMPT_TOKENS, tokens) + 1]
    return [StepShape(size, PROMPTS, length) for length in lengths for size in sizes]


def window_shapes(sequences: int, window: int, tokens: int, trees: bool = False) -> list[StepShape]:
    """Batches of up to ``sequences`` that have up to ``window`` tentative tokens each behind their newest one, and up
    to ``tokens`` in all; one more takes the tokens that are left over. Those without tentative tokens may come first,
    one token each.

    Sequences have as many tentative tokens as it happens, or as a controller has them: so that steps with few are not
    padded to those with all, there are shapes for half as many each time, and for crowds that lie half apart. With
    ``trees``, sequences may have masks.
    """
    powers = [1 << number for number in range(sequences.bit_length())]
    sizes = sorted({each for power in powers for each in (power, 3 * power // 2, sequences) if each <= sequences})
    lengths = [window >> number for number in range(min(window.bit_length(), LENGTHS))]
    masked = 1 + window if trees else 0
    pairs = [(size, length) for size in sizes for length in lengths if size * (1 + length) <= tokens]
    return [StepShape(0, size + 1, size * (1 + length) + 1, masked) for size, length in pairs]


def rows_worth_replaying(shapes: list[StepShape], seconds: Callable[[StepShape], tuple[float, float]]) -> int:
    """The most rows that steps of ``shapes`` may have for the device to compute them about as fast as the host queues
    them kernel by kernel; 0 where none are. A graph of one with more would save nothing, and cost what it pads.

    Shapes that lie :data:`APART` are timed, and the largest one, again and again in turns: what disturbs the machine
    for a while disturbs all of them, and the medians are hardly touched. To queue a step takes as long whatever its
    rows are.

    Args:
        seconds: what queueing a step of a shape takes, and computing it.
    """
    ascending = sorted(shapes, key=lambda shape: shape.rows)
    tried: list[StepShape] = []
    for shape in ascending:
        # The largest is what a whole budget of tokens makes, step after step.
        if not tried or shape.rows >= APART * tried[-1].rows or shape is ascending[-1]:
            tried.append(shape)
    for shape in tried:  # the first of each compiles what it needs
        seconds(shape)
    rounds = [[seconds(shape) for shape in tried] for _ in range(ROUNDS)]
    queued = median(queued for each in rounds for queued, _ in each)
    most = 0
    for shape, *times in zip(tried, *rounds, strict=True):
        if median(computed for _, computed in times) > SLACK * queued:
            break
        most = shape.rows
    return most


@torch.inference_mode()
def seconds(
    run: Callable[[Tensor], Any], fields: int, cache: PagedCache, padding: int, shape: StepShape
) -> tuple[float, float]:
    """Seconds until a pass of ``shape`` over the ``padding`` block is queued kernel by kernel, and until it is
    computed."""
    device = cache.shape.device
    inputs = torch.zeros(fields, shape.rows, dtype=torch.int64, device=device)
    cache.plan(dataclasses.replace(padded(NOBODY, shape, padding, cache.shape.block_size), shape=None))
    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    run(inputs)
    queued = time.perf_counter() - begun
    torch.cuda.synchronize(device)
    return queued, time.perf_counter() - begun


_NONE = torch.zeros(0, dtype=torch.int32)
#: A batch without sequences.
NOBODY = PagedBatch(torch.zeros(1, dtype=torch.int32), _NONE, _NONE.view(0, 1), _NONE.long())


class Captured(NamedTuple):
    """A graph, and where its input and output lie."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    output: Any


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """On which graphs are captured: only those of one stream use each other's memory."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class StepGraphs:
    """Graphs of a pass for batches of some shapes; a batch between two is padded.

    Args:
        run: the pass: int64 [fields, N] for N tokens, to tensors. Tokens of which all is 0 must do no harm.
        fields: what the pass is told of each token.
        cache: the cache that the pass reads and writes; it must be able to :meth:`~PagedCache.fix` its plans.
        pages: most blocks of a sequence.
        padding: a block that belongs to nobody, for the sequences that fill up a batch.
        pool: memory that graphs share: one at a time is replayed.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Any],
        fields: int,
        cache: PagedCache,
        *,
        pages: int,
        padding: int,
        pool: Any = None,
    ) -> None:
        self._run, self._fields, self._cache = run, fields, cache
        self._pages, self._padding, self._pool = pages, padding, pool
        self._captured: dict[StepShape, Captured] = {}
        self._ascending: list[StepShape] = []
        self._met = set[int]()  # numbers of rows, up to which power of two, that were computed before a capture

    @property
    def shapes(self) -> list[StepShape]:
        """Those for which there is a graph, or will be, by the number of their rows."""
        return self._ascending

    def capture(self, shapes: list[StepShape], bar: Bar, later: Collection[StepShape] = ()) -> None:
        """Captures the pass for batches of each of ``shapes``, those that are captured ``later`` when there is a batch.
        Largest first: the others then fit in its memory."""
        if not self._cache.fix(shapes, self._pages):
            raise ValueError("the cache's plans cannot be replayed")
        for shape in _largest_first(shapes):
            if shape not in later:
                self._captured[shape] = self._capture(shape)
                bar.advance()
        self._ascending = _largest_first(shapes)[::-1]

    def try_out(self, shapes: list[StepShape], free: Callable[[], int]) -> int:
        """About how many bytes graphs of ``shapes``, for which the cache's plans are fixed, will take: as many as the
        largest, which brings the memory that all share, and for each other one what the next ones bring. They are
        captured to be measured, and stay. ``free`` says how many bytes are free."""
        before, taken = free(), []
        for shape in _largest_first(shapes)[:TRIED]:
            self._captured[shape] = self._capture(shape)
            taken.append(before - free())
        if not taken:
            return 0
        each = (taken[-1] - taken[0]) / max(len(taken) - 1, 1)
        return max(round(taken[0] + each * (len(shapes) - 1)), 0)

    @torch.inference_mode()
    def _capture(self, shape: StepShape) -> Captured:
        device = self._cache.shape.device
        inputs = torch.zeros(self._fields, shape.rows, dtype=torch.int64, device=device)
        self._plan(NOBODY, shape)
        # Kernels are chosen by the number of rows, up to powers of two, as a rule. What is chosen for the first time is
        # compiled, and may be timed; and what it needs and keeps must not become a part of one graph.
        alike = (shape.rows - 1).bit_length()
        if alike not in self._met:
            self._run(inputs)
            self._met.add(alike)
        torch.cuda.synchronize(device)
        try:
            return self._captured_with(inputs)
        except CapturedTooEarlyError:
            self._run(inputs)
            torch.cuda.synchronize(device)
            return self._captured_with(inputs)

    def _captured_with(self, inputs: Tensor) -> Captured:
        """The pass as it is planned, as a graph of which nothing is computed yet."""
        graph = torch.cuda.CUDAGraph()
        # PyTorch's context for this would empty the allocator's cache, which there may be steps to use. Whatever else
        # a process does meanwhile, such as to load a kernel, goes on.
        with torch.cuda.stream(_stream(inputs.device)):
            graph.capture_begin(pool=self._pool, capture_error_mode="relaxed")
            try:
                output = self._run(inputs)
            finally:
                graph.capture_end()
        return Captured(graph, inputs, output)

    def _plan(self, batch: PagedBatch, shape: StepShape) -> None:
        self._cache.plan(padded(batch, shape, self._padding, self._cache.shape.block_size))

    def shape_for(self, batch: PagedBatch) -> StepShape | None:
        """The smallest of the :attr:`shapes` that ``batch`` can be padded to, None where there is none."""
        own, alike = batch.own_shape, _all_alike(batch.own_shape)
        large = bisect_left(self._ascending, own.rows, key=lambda shape: shape.rows)
        given = itertools.islice(self._ascending, large, None)
        return next((shape for shape in given if (own if shape.singles else alike).fits(shape)), None)

    def replay(self, shape: StepShape, inputs: np.ndarray, batch: PagedBatch) -> tuple[Any, np.ndarray]:
        """What the pass gives for ``batch``, padded to ``shape``, whose N tokens have the ``inputs`` int64 [fields, N],
        and the row of each of them in it. It lies where the next replay puts its own."""
        if shape not in self._captured:
            self._captured[shape] = self._capture(shape)
        captured, own = self._captured[shape], taken_as(batch, shape)
        self._plan(batch, shape)
        rows = np.arange(own.rows)
        rows[own.singles :] += shape.singles - own.singles
        spread = np.zeros((self._fields, shape.rows), np.int64)
        spread[:, rows] = inputs
        captured.inputs.copy_(pinned(spread, self._cache.shape.device), non_blocking=True)
        captured.graph.replay()
        return captured.output, rows

    def again(self, shape: StepShape) -> None:
        """The pass that was replayed last, of this ``shape``, once more: with what it has made of its inputs."""
        self._captured[shape].graph.replay()


def with_prompts(shapes: list[StepShape]) -> list[StepShape]:
    """Those of ``shapes`` that are for steps with prompts, but the largest of all, whose memory others need."""
    return [shape for shape in _largest_first(shapes)[1:] if shape.singles and shape.others]


def onward_shapes(sequences: int, passes: int) -> list[StepShape]:
    """Batches of up to ``sequences`` that decode so many tokens one after the other while the host says nothing."""
    return [shape._replace(onward=passes - 1) for shape in decode_shapes(sequences)] if passes > 0 else []


def _largest_first(shapes: list[StepShape]) -> list[StepShape]:
    return sorted(shapes, key=lambda shape: shape.rows, reverse=True)


def taken_as(batch: PagedBatch, shape: StepShape) -> StepShape:
    """What ``batch`` counts as beside ``shape``: where that has none with one new token, such sequences are like the
    others."""
    return batch.own_shape if shape.singles else _all_alike(batch.own_shape)


def _all_alike(own: StepShape) -> StepShape:
    return StepShape(0, own.singles + own.others, own.rows, own.masked)


def padded(batch: PagedBatch, shape: StepShape, block: int, size: int) -> PagedBatch:
    """``batch`` with sequences up to ``shape`` whose blocks of ``size`` tokens are all the same ``block``: behind those
    with one new token each, and behind the others, where the last has what is left."""
    own = taken_as(batch, shape)
    singles, others = shape.singles - own.singles, shape.others - own.others
    if own.rows == shape.rows and not (singles or others):  # nothing is missing
        given = batch.starts, batch.lengths, batch.tables, batch.slots
        return PagedBatch(*given, parents=batch.parents, shape=shape, watched=batch.watched)
    more = np.ones(others, np.int32)
    more[-1:] = shape.tokens - own.tokens - max(others - 1, 0)
    fill = [np.ones(singles, np.int32), more]
    counts = _woven(np.diff(batch.starts.numpy()), fill, own.singles)
    lengths = _woven(batch.lengths.numpy(), fill, own.singles)
    width = max(batch.tables.shape[1], -(-int(more.max(initial=1)) // size))
    tables = np.full((len(counts), width), block, np.int32)
    tables[: own.singles, : batch.tables.shape[1]] = batch.tables.numpy()[: own.singles]
    behind = slice(shape.singles, shape.singles + own.others)
    tables[behind, : batch.tables.shape[1]] = batch.tables.numpy()[own.singles :]
    nowhere = [np.full(int(each.sum()), block * size, np.int64) for each in fill]
    parents = None
    if batch.parents is not None:
        in_a_row = [np.concatenate([np.arange(-1, count - 1) for count in (0, *each)]) for each in fill]
        parents = torch.from_numpy(_woven(batch.parents.numpy(), in_a_row, own.singles).astype(np.int32))
    return PagedBatch(
        starts=torch.from_numpy(np.concatenate([[0], counts.cumsum()]).astype(np.int32)),
        lengths=torch.from_numpy(lengths),
        tables=torch.from_numpy(tables),
        slots=torch.from_numpy(_woven(batch.slots.numpy(), nowhere, own.singles)),
        parents=parents,
        shape=shape,
        watched=None
        if batch.watched is None
        else torch.from_numpy(_woven(batch.watched.numpy(), [np.zeros_like(each) for each in nowhere], own.singles)),
    )


def _woven(own: np.ndarray, fill: list[np.ndarray], singles: int) -> np.ndarray:
    """``own`` with the first ``fill`` behind its first ``singles``, and the second at the end."""
    return np.concatenate([own[:singles], fill[0], own[singles:], fill[1]])
