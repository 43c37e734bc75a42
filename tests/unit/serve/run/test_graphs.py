"""Steps that are padded to the shape of a graph: what each token's row gives is what it gives in a step of its own."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from penstock.core.devices import lasting
from penstock.core.progress import silent
from penstock.core.randomness import numpy_generator
from penstock.models.paged import PagedTokens
from penstock.ops.paged.contract import CacheShape, PagedBatch, PagedCache, StepShape
from penstock.ops.paged.reference import Reference
from penstock.serve.run.graphs import (
    APART,
    PROMPT_TOKENS,
    ROUNDS,
    StepGraphs,
    decode_shapes,
    prompt_shapes,
    rows_worth_replaying,
    taken_as,
    window_shapes,
    with_prompts,
)
from penstock.speculate.tree import depths
from penstock.testing.rehearsed_graphs import RehearsedGraphs
from penstock.testing.serve_model import SHAPE, small_model

BLOCKS, SIZE, PAGES = 60, 4, 12


def capture(graphs: StepGraphs, shapes: list[StepShape]) -> None:
    with silent("capturing", len(shapes), "graphs") as bar:
        graphs.capture(shapes, bar)


def opened() -> PagedCache:
    windows = frozenset(SHAPE.window_of(layer) for layer in range(SHAPE.layers))
    cpu = torch.device("cpu")
    shape = CacheShape(
        SHAPE.layers, SHAPE.heads, SHAPE.kv_heads, SHAPE.head_dim, BLOCKS + 1, SIZE, torch.float64, cpu, windows
    )
    cache = Reference().open(shape)
    cache.fix = lambda shapes, pages: True
    return cache


def batch_of(lengths: list[int], counts: list[int]) -> PagedBatch:
    """The last ``counts`` tokens of sequences of these ``lengths``, each with blocks of its own."""
    tables = torch.arange(len(lengths) * PAGES, dtype=torch.int32).view(-1, PAGES)
    slots = [
        int(table[p // SIZE]) * SIZE + p % SIZE
        for table, n, count in zip(tables, lengths, counts, strict=True)
        for p in range(n - count, n)
    ]
    starts = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    return PagedBatch(starts, torch.tensor(lengths, dtype=torch.int32), tables, torch.tensor(slots))


def positions_of(lengths: list[int], counts: list[int]) -> Tensor:
    return torch.cat([torch.arange(n - count, n) for n, count in zip(lengths, counts, strict=True)])


def test_steps_with_prompts_are_captured_when_there_is_one():
    """All others before, and the largest, whose memory is everybody's."""
    captured, run = list[int](), lambda inputs: (captured.append(inputs.shape[1]), inputs)[1:]
    shapes = [*decode_shapes(8), StepShape(0, 3, 9), *(StepShape(size, 4, 12) for size in (2, 4, 8))]
    graphs = RehearsedGraphs(run, 2, opened(), pages=PAGES, padding=BLOCKS)
    with silent("capturing", 6, "graphs") as bar:
        graphs.capture(shapes, bar, with_prompts(shapes))
    assert captured == [20, 9, 8, 6, 4, 2] and graphs.shapes == sorted(shapes, key=lambda shape: shape.rows)
    batch, inputs = batch_of([7, 9, 5], [1, 1, 5]), np.ones((2, 7), np.int64)
    shape = graphs.shape_for(batch)
    assert shape == StepShape(2, 4, 12)
    for _ in range(2):
        captured.clear()
        graphs.replay(shape, inputs, batch)
    assert captured == [14], "it is captured once"


def test_a_pass_is_computed_before_it_is_captured_where_kernels_may_be_others(monkeypatch):
    """Once for all shapes of about as many rows; and where it turns out to need what lasts, and is not there yet."""
    capturing, told = [False], list[tuple[str, int]]()

    class Graph:
        def capture_begin(self, **_: object) -> None:
            capturing[0] = True

        def capture_end(self) -> None:
            capturing[0] = False

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr("penstock.serve.run.graphs._stream", lambda _: None)

    @lasting
    def table(rows: int) -> int:
        return rows

    def run(inputs: Tensor) -> Tensor:
        rows = inputs.shape[1]
        told.append(("captured" if capturing[0] else "computed", rows))
        return inputs + table(rows if rows in (12, 3) else 0)

    graphs = StepGraphs(run, 2, opened(), pages=PAGES, padding=BLOCKS)
    capture(graphs, [StepShape(rows) for rows in (2, 3, 4, 9, 12, 16)])
    assert told == [
        *(("computed", 16), ("captured", 16)),
        *(("captured", 12), ("computed", 12), ("captured", 12)),
        ("captured", 9),
        *(("computed", 4), ("captured", 4)),
        *(("captured", 3), ("computed", 3), ("captured", 3)),
        *(("computed", 2), ("captured", 2)),
    ]
    assert not capturing[0] and graphs._captured[StepShape(12)].output[0, 0] == 12


@pytest.mark.parametrize("counts", [[1], [1, 1, 1], [1, 1, 7], [5], [3, 1, 2], [1, 2, 2, 2], [1, 1, 1, 16]])
def test_a_padded_step_gives_what_the_step_gives(counts):
    model = copy.deepcopy(small_model()).double()
    draw = numpy_generator(0, "graphs")
    lengths = [count + int(draw.integers(0, 20)) for count in counts]
    history = [length - count for length, count in zip(lengths, counts, strict=True)]
    tokens = torch.from_numpy(draw.integers(SHAPE.vocabulary, size=sum(lengths)))
    told = [
        row.split([before, count]) for row, before, count in zip(tokens.split(lengths), history, counts, strict=True)
    ]
    results = []
    for padded in (False, True):
        cache = opened()

        def run(inputs: Tensor, cache: PagedCache = cache) -> tuple[Tensor]:
            tokens, positions = inputs
            return (model.logits(model(tokens, PagedTokens(positions, cache)).hidden),)

        shapes = [*decode_shapes(4), StepShape(4, 4, 12), StepShape(4, 4, 24), StepShape(2, 4, 24)]
        graphs = RehearsedGraphs(run, 2, cache, pages=PAGES, padding=BLOCKS)
        capture(graphs, shapes)
        with torch.inference_mode():
            if any(history):
                # Of the sequences with a past, one that has none here computes its first token twice.
                past = [max(before, 1) for before in history]
                cache.plan(batch_of(past, past))
                first = torch.cat([own[0] if len(own[0]) else own[1][:1] for own in told])
                run(torch.stack([first, positions_of(past, past)]))
            inputs = torch.stack([torch.cat([own[1] for own in told]), positions_of(lengths, counts)])
            batch = batch_of(lengths, counts)
            if padded:
                shape = graphs.shape_for(batch)
                assert shape is not None
                (output,), rows = graphs.replay(shape, inputs.numpy(), batch)
                results.append(output[rows])
            else:
                cache.plan(batch)
                results += run(inputs)
    torch.testing.assert_close(*results)


#: Parents of new tokens, among their own sequence's: in a row, and trees, also of tokens behind two new ones in a row.
TREES = [[-1], [-1, 0, 0, 1, 1, 2], [-1, 0, 1], [-1, -1, 0], [-1, 0, 1, 1, 2]]


@pytest.mark.parametrize("chosen", [[1], [0, 1], [0, 0, 2, 3], [4, 2, 1], [1, 3, 4, 0]])
def test_a_padded_step_of_trees_gives_what_the_step_gives(chosen):
    model, draw = copy.deepcopy(small_model()).double(), numpy_generator(0, "trees")
    ways = [TREES[each] for each in chosen]
    past = [1 + int(draw.integers(0, 15)) for _ in ways]
    counts = [len(way) for way in ways]
    lengths = [before + count for before, count in zip(past, counts, strict=True)]
    known, new = (torch.from_numpy(draw.integers(SHAPE.vocabulary, size=sum(each))) for each in (past, counts))
    positions = torch.tensor(
        [before + each for before, way in zip(past, ways, strict=True) for each in np.array(depths(way)) - 1]
    )
    parents = torch.tensor([parent for way in ways for parent in way], dtype=torch.int32)
    batch = dataclasses.replace(batch_of(lengths, counts), parents=parents)
    results = []
    for padded in (False, True):
        cache = opened()

        def run(inputs: Tensor, cache: PagedCache = cache) -> tuple[Tensor]:
            tokens, positions = inputs
            return (model.logits(model(tokens, PagedTokens(positions, cache)).hidden),)

        graphs = RehearsedGraphs(run, 2, cache, pages=PAGES, padding=BLOCKS)
        capture(graphs, [StepShape(0, 6, 30), *window_shapes(4, 5, 100, trees=True)])
        with torch.inference_mode():
            cache.plan(batch_of(past, past))
            run(torch.stack([known, positions_of(past, past)]))
            inputs = torch.stack([new, positions])
            if padded:
                shape = graphs.shape_for(batch)
                assert shape is not None and shape.masked
                (output,), rows = graphs.replay(shape, inputs.numpy(), batch)
                results.append(output[rows])
            else:
                cache.plan(batch)
                results += run(inputs)
    torch.testing.assert_close(*results)


def test_where_tokens_have_masks_a_shape_with_room_for_them_is_taken():
    graphs = RehearsedGraphs(lambda _: (), 2, opened(), pages=1, padding=0)
    capture(graphs, [StepShape(0, 3, 12), StepShape(0, 3, 13, 4), StepShape(0, 3, 20, 9)])

    def found(*ways: list[int]) -> StepShape | None:
        counts = [len(way) for way in ways]
        parents = torch.tensor([parent for way in ways for parent in way], dtype=torch.int32)
        return graphs.shape_for(dataclasses.replace(batch_of(counts, counts), parents=parents))

    assert found([-1, 0, 1], [-1]) == StepShape(0, 3, 12, 0)  # all in a row
    assert found([-1, 0, 0], [-1]) == StepShape(0, 3, 13, 4)
    assert found([-1, 0, 0, 1, 1], [-1]) == StepShape(0, 3, 13, 4)  # the newest token is before the mask
    assert found([-1, 0, 0, 1, 1, 2], [-1]) == StepShape(0, 3, 20, 9)
    assert found([-1, -1, 0, 0, 1, 1, 2, 2, 3, 3]) is None


@given(st.sampled_from([1, 5, 16, 200]), st.sampled_from([1, 2, 5, 8, 30]), st.data())
def test_all_that_can_be_drafted_has_a_shape_which_is_the_smallest_and_not_much_larger(sequences, window, data):
    shapes = window_shapes(sequences, window, 10**6)
    lengths = data.draw(st.lists(st.integers(0, window), min_size=1, max_size=sequences))
    counts = sorted(1 + length for length in lengths)
    batch = batch_of(counts, counts) if len(counts) * PAGES < 10**4 else None
    assert batch is not None
    graphs = RehearsedGraphs(lambda _: (), 2, opened(), pages=1, padding=0)
    graphs._captured, graphs._ascending = dict.fromkeys(shapes), sorted(shapes, key=lambda shape: shape.rows)
    found = graphs.shape_for(batch)
    fitting = [shape for shape in shapes if taken_as(batch, shape).fits(shape)]
    assert found is not None and found.rows == min(shape.rows for shape in fitting)
    longest = max(lengths) or 1
    assert found.rows - 1 <= 3 / 2 * len(counts) * 2 * (1 + longest)


@pytest.mark.parametrize(("window", "most"), [(1, 17), (5, 51), (8, 68)])
def test_there_are_few_shapes_of_windows_the_same_each_time(window, most):
    shapes = window_shapes(256, window, 8192)
    assert shapes == window_shapes(256, window, 8192) and len(set(shapes)) == len(shapes) <= most
    assert max(shape.tokens for shape in shapes) == 256 * (1 + window) + 1
    assert not window_shapes(256, 0, 8192)
    assert max(shape.tokens for shape in window_shapes(256, 64, 8192)) <= 8193
    assert {shape.masked for shape in window_shapes(8, 5, 100, trees=True)} == {6}


def test_the_smallest_shape_that_fits_is_taken():
    graphs = RehearsedGraphs(lambda _: (), 2, opened(), pages=1, padding=0)
    capture(graphs, [StepShape(8, 4, 64), StepShape(2, 4, 16), StepShape(8, 4, 16)])

    def found(*counts: int) -> StepShape | None:
        return graphs.shape_for(batch_of(list(counts), list(counts)))

    assert found(1, 1, 9) == StepShape(2, 4, 16)
    assert found(1, 1, 13) == StepShape(2, 4, 16)
    assert found(1, 1, 14) == StepShape(8, 4, 64)  # three more sequences need a token each
    assert found(1, 1, 1, 9) == StepShape(8, 4, 16)
    assert found(2, 2, 2, 10) == StepShape(2, 4, 16)
    assert found(2, 2, 2, 9) is None  # nobody is left to take the other tokens
    assert found(*[2] * 5) is None
    assert found(*[1] * 9, 2) is None
    assert found(40, 25) is None


@pytest.mark.parametrize("sequences", [1, 2, 3, 17, 64, 100, 512])
def test_shapes_reach_the_largest_batch_and_do_not_lie_far_apart(sequences):
    sizes = [shape.singles for shape in decode_shapes(sequences)]
    assert sizes[-1] == max(sequences, 2)
    assert all(0 < larger - smaller <= max(2, smaller / 4) for smaller, larger in itertools.pairwise(sizes))
    shapes = prompt_shapes(sequences, 300)
    assert max(shape.singles for shape in shapes) == sequences
    assert {shape.tokens for shape in shapes} == {64, 128, 192, 256, 384}
    assert len(set(shapes)) == len(shapes) == 5 * len({shape.singles for shape in shapes})
    assert {shape.tokens for shape in prompt_shapes(sequences, 10**6)} == set(PROMPT_TOKENS)


@given(
    shapes=st.lists(st.builds(StepShape, st.integers(1, 99), st.just(8), st.integers(8, 999)), min_size=1, unique=True),
    rate=st.floats(1e2, 1e6),
)
def test_steps_that_take_longer_to_compute_than_to_queue_are_not_captured(shapes, rate):
    asked = []

    def seconds(shape: StepShape) -> tuple[float, float]:
        asked.append(shape)
        return 0.01, max(0.01, shape.rows / rate)

    most = rows_worth_replaying(shapes, seconds)
    worth = [shape.rows for shape in shapes if shape.rows / rate <= 0.012]
    assert (most == 0) == (not worth)
    assert all(rows < APART * most for rows in worth) and most <= max(worth, default=0)
    assert most == max(shape.rows for shape in shapes) or len(worth) < len(shapes)
    assert len(set(asked)) <= 2 + math.log(107.0 * 10, APART)


@given(st.integers(0, 2**32), st.sampled_from([7e4, 1.03e5, 1.7e5]))
def test_the_choice_is_the_same_on_a_machine_that_is_disturbed(seed, rate):
    """Three times of eleven a step takes up to ten times as long, and all times vary by a twenty-fifth."""
    shapes, draw = prompt_shapes(256, 2048), numpy_generator(seed, "disturbed")
    calls: Counter[StepShape] = Counter()
    disturbed = {shape: set(1 + draw.choice(ROUNDS, 3, replace=False)) for shape in shapes}

    def seconds(shape: StepShape) -> tuple[float, float]:
        slow = calls[shape] in disturbed[shape]
        calls[shape] += 1
        factor = draw.uniform(0.98, 1.02) * (draw.uniform(1, 10) if slow else 1)
        return 0.01 * factor, (0.002 + shape.rows / rate) * factor

    assert rows_worth_replaying(shapes, seconds) == rows_worth_replaying(
        shapes, lambda shape: (0.01, 0.002 + shape.rows / rate)
    )


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_memory_of_graphs_is_that_of_the_largest_and_of_what_others_add(count):
    """Graphs share 1,000 bytes a row; each takes 70 for itself."""
    graphs = RehearsedGraphs(lambda _: (), 2, opened(), pages=1, padding=0)
    shapes = decode_shapes(40)[-count:] if count else []

    def free() -> int:
        held = [shape.rows for shape in graphs._captured]
        return 10**9 - 1000 * max(held, default=0) - 70 * len(held)

    wanted = 1000 * 40 + 70 * count if count else 0
    assert graphs.try_out(shapes, free) == wanted
    assert len(graphs._captured) == min(count, 3)
