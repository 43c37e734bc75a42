"""Which decoding steps are replayed from a graph."""

from __future__ import annotations

import itertools

import pytest
import torch

from penstock.ops.paged.contract import CacheShape, PagedBatch, PagedCache
from penstock.serve.graphs import LONG_READ, DecodeGraphs, graph_sizes


class Fixed(PagedCache):
    def fix(self, sizes: list[int], pages: int) -> bool:
        return True


def decoding(lengths: list[int]) -> PagedBatch:
    count = len(lengths)
    starts = torch.arange(count + 1, dtype=torch.int32)
    return PagedBatch(
        starts, torch.tensor(lengths, dtype=torch.int32), torch.zeros(count, 1, dtype=torch.int32), starts[1:].long(), 1
    )


@pytest.fixture
def graphs(monkeypatch) -> DecodeGraphs:
    """Graphs of all sizes but the largest, of a model whose layers store 4,096 bytes a token."""
    shape = CacheShape(36, 32, 8, 128, 1, 16, torch.bfloat16, torch.device("cpu"))
    made = DecodeGraphs(lambda *_: torch.zeros(0), Fixed(shape), sequences=40, pages=1, padding=0)
    monkeypatch.setattr(made, "_captured", dict.fromkeys(made.sizes[:-1]))
    return made


@pytest.mark.parametrize(("count", "size"), [(1, 2), (2, 2), (3, 4), (17, 20), (32, 32), (33, None), (40, None)])
def test_a_batch_is_padded_to_the_next_size_that_was_captured(graphs, count, size):
    assert graphs.size_for(decoding([7] * count)) == size


def test_a_batch_that_reads_for_long_is_not_replayed(graphs):
    most = LONG_READ // 4096
    assert graphs.size_for(decoding([most // 2, most // 2])) == 2
    assert graphs.size_for(decoding([most // 2, most // 2 + 1])) is None


@pytest.mark.parametrize("sequences", [1, 2, 3, 17, 64, 100, 512])
def test_sizes_grow_to_the_largest_batch_by_a_quarter_at_most(sequences):
    sizes = graph_sizes(sequences)
    assert sizes[-1] == max(sequences, 2)
    assert all(0 < larger - smaller <= max(2, smaller / 4) for smaller, larger in itertools.pairwise(sizes))
