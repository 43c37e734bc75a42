"""Masks of a batch: what they mean, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.ops.paged.contract import PagedBatch
from penstock.testing.paged_scene import Open, Tree, sees


def batch(counts, cached, parents=None, opened=None) -> PagedBatch:
    """Sequences with so many new tokens each, after so many in the cache."""
    starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    lengths = torch.tensor([new + old for new, old in zip(counts, cached, strict=True)], dtype=torch.int32)
    given_ = (None if each is None else torch.tensor(each, dtype=torch.int32) for each in (parents, opened))
    return PagedBatch(
        starts, lengths, torch.zeros(len(counts), 1, dtype=torch.int32), torch.zeros(sum(counts)), *given_
    )


@st.composite
def masked(draw: st.DrawFn) -> tuple[list[int], list[int], list[Tree | Open]]:
    counts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    masks: list[Tree | Open] = []
    for count in counts:
        tree = draw(st.booleans())
        parents = tuple(draw(st.integers(-1, i - 1)) if draw(st.booleans()) else i - 1 for i in range(count))
        masks.append(Tree(parents) if tree else Open(draw(st.integers(0, count))))
    return counts, [draw(st.integers(0, 5)) for _ in counts], masks


@given(masked())
def test_masks_are_what_the_definition_says(case):
    """Put together with what is before it, each mask is who sees whom; without one, a sequence is causal."""
    counts, cached, given_ = case
    parents = [p for count, mask in zip(counts, given_, strict=True) for p in parents_of(mask, count)]
    opened = [mask.count if isinstance(mask, Open) else 0 for mask in given_]
    masks = batch(counts, cached, parents, opened).masks
    for sequence, (count, old, mask) in enumerate(zip(counts, cached, given_, strict=True)):
        wanted = sees(old + count, count, mask, None).numpy()
        causal = sees(old + count, count, None, None).numpy()
        if masks is None or sequence not in masks.sequences:
            assert (wanted == causal).all()
            continue
        index = list(masks.sequences).index(sequence)
        before = masks.before[index]
        assert masks.counts[index] == old + count - before
        got = causal.copy()
        got[before - old :, before:] = masks.matrix(index)
        assert (got == wanted).all()
        assert not (wanted == causal).all()


def parents_of(mask: Tree | Open, count: int) -> tuple[int, ...]:
    return mask.parents if isinstance(mask, Tree) else tuple(range(-1, count - 1))


def test_positions_in_a_tree_count_from_its_root():
    masks = batch([2, 6], [3, 10], [-1, 0, -1, 0, 1, 1, -1, 4]).masks
    assert masks is not None
    assert masks.positions.tolist() == [3, 4, 10, 11, 12, 12, 10, 11]


def test_what_is_in_a_row_has_no_mask():
    """A long prompt before a small tree does not make the tree's matrix large."""
    assert batch([3], [2], [-1, 0, 1]).masks is None
    assert batch([3, 1], [2, 0], opened=[1, 0]).masks is None
    masks = batch([1000], [0], [*range(-1, 997), 997, 997]).masks
    assert masks is not None
    assert masks.counts.tolist() == [2]
    assert (masks.matrix(0) == np.eye(2, dtype=bool)).all()


@pytest.mark.parametrize(
    ("parents", "opened", "complaint"),
    [
        ([-1, 1, 0], None, "token 1 of sequence 0 has the parent 1"),
        ([-1, 0, 2], None, "token 2 of sequence 0 has the parent 2"),
        ([-2, 0, 1], None, "has the parent -2"),
        ([-1, 0], None, "do not fit"),
        (None, [4], "3 new tokens, and 4 of them open"),
        (None, [-1], "-1 of them open"),
        (None, [1, 1], "do not fit"),
        ([-1, 0, 0], [2], "both a tree and open tokens"),
    ],
)
def test_masks_that_cannot_be_meant_are_refused(parents, opened, complaint):
    with pytest.raises(ValueError, match=complaint):
        _ = batch([3], [4], parents, opened).masks
