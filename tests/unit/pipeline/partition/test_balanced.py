"""Cuts into stages of even cost are optimal."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import UsageError
from penstock.pipeline.partition.balanced import balanced, counted_costs, cut
from penstock.testing.pipeline_runtime import sparse


def most_expensive(costs, stages, first, last):
    sums = [sum(costs[i] for i in stage) for stage in stages]
    sums[0] += first
    sums[-1] += last
    return max(sums)


def most_held(costs, stages):
    """What the stages of 1F1B hold of activations, each as much for a layer as it costs."""
    return max((len(stages) - s) * sum(costs[i] for i in stage) for s, stage in enumerate(stages))


@given(
    costs=st.lists(st.integers(0, 20), min_size=1, max_size=8),
    first=st.integers(0, 20),
    last=st.integers(0, 40),
    data=st.data(),
)
def test_no_cut_is_better(costs, first, last, data):
    layers = len(costs)
    count = data.draw(st.integers(1, layers))
    stages = balanced(costs, count, first=first, last=last)
    assert [layer for stage in stages for layer in stage] == list(range(layers))
    assert len(stages) == count
    assert all(stages)
    cuts = itertools.combinations(range(1, layers), count - 1)
    every = [[range(a, b) for a, b in itertools.pairwise((0, *inner, layers))] for inner in cuts]
    best = min((most_expensive(costs, found, first, last), most_held(costs, found)) for found in every)
    assert (most_expensive(costs, stages, first, last), most_held(costs, stages)) == best


def test_of_equal_cuts_the_one_that_holds_least():
    stages = balanced([1.0] * 42, 16)
    assert max(map(len, stages)) == 3
    assert most_held([1] * 42, stages) == 32  # two layers in each of the first stages, of 16, 15, ... microbatches


@pytest.mark.parametrize("stages", [0, 4])
def test_too_many_stages_are_refused(stages):
    with pytest.raises(UsageError, match="3 layers cannot be cut"):
        balanced([1.0, 1.0, 1.0], stages)


def test_counted_costs_are_the_whole_and_weigh_the_head():
    config = sparse(4)
    layers, head = counted_costs(config, 7)
    assert sum(layers) + head == pytest.approx(config.flops_per_token(7))
    assert head == 2 * config.vocabulary * config.hidden
    assert len(set(layers[1:])) == 1  # all but the first are mixtures of experts
    wide = config.model_copy(update={"vocabulary": 10_000})
    assert len(cut(wide, 2, 7)[1]) < len(cut(config, 2, 7)[1])
