"""The partitioner against all partitions there are."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effort import lines
from penstock.core.errors import UsageError
from penstock.pipeline.partition.pipedream import Layer, Partition, Stage, partition

NUMBERS = st.integers(0, 20).map(float)
LAYERS = st.lists(st.builds(Layer, NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=6)


def compositions(total: int, parts: int) -> list[tuple[int, ...]]:
    """All ways to write ``total`` as an ordered sum of ``parts`` positive numbers."""
    return [sizes for sizes in itertools.product(range(1, total + 1), repeat=parts) if sum(sizes) == total]


def seconds(layers: list[Layer], stages: list[tuple[int, int, int]], bandwidth: float) -> float:
    """The slowest part, from the paper's formulas: max(work, 4 (r-1)/r weights / bandwidth) / r, and 2 activations."""
    slowest = 0.0
    for first, last, r in stages:
        work = sum(layer.seconds for layer in layers[first:last])
        exchange = 4 * (r - 1) / r * sum(layer.weights for layer in layers[first:last]) / bandwidth
        slowest = max(slowest, work / r, exchange / r)
        if last < len(layers):
            slowest = max(slowest, 2 * layers[last - 1].activation / bandwidth)
    return slowest


def everything(layers: list[Layer], devices: int, bandwidth: float) -> float:
    """The least over all cuts and replications."""
    found = []
    for count in range(1, min(len(layers), devices) + 1):
        for sizes in compositions(len(layers), count):
            ends = list(itertools.accumulate(sizes))
            for replicas in compositions(devices, count):
                stages = list(zip([0, *ends], ends, replicas, strict=False))
                found.append(seconds(layers, stages, bandwidth))
    return min(found)


@given(layers=LAYERS, devices=st.integers(1, 5), bandwidth=st.sampled_from([0.5, 1.0, 4.0, 1e6]))
def test_no_partition_is_faster(layers, devices, bandwidth):
    found = partition(layers, devices, bandwidth)
    assert found.seconds == pytest.approx(everything(layers, devices, bandwidth), rel=1e-12)
    stages = [(stage.first, stage.last, stage.replicas) for stage in found.stages]
    assert seconds(layers, stages, bandwidth) == pytest.approx(found.seconds, rel=1e-12)
    assert sum(stage.replicas for stage in found.stages) == devices
    assert [stage.first for stage in found.stages] == [0, *(stage.last for stage in found.stages[:-1])]
    assert found.stages[-1].last == len(layers)


def test_heavy_weights_are_not_replicated_and_heavy_activations_not_cut():
    convolutions = [Layer(10, 100, 1)] * 3
    classifier = [Layer(10, 1, 200)]
    found = partition([*convolutions, Layer(0, 1, 0), *classifier], 4, 10.0)
    assert found == Partition((Stage(0, 4, 3), Stage(4, 5, 1)), 10.0)


def test_data_parallel_where_nothing_is_exchanged():
    assert partition([Layer(3, 0, 0)] * 4, 3, 1.0) == Partition((Stage(0, 4, 3),), 4.0)


def test_work_grows_polynomially():
    """As the squares of layers and devices, the paper's bound: twice of both are at most little more than 16 times."""

    def work(layers: int, devices: int) -> int:
        return lines(lambda: partition([Layer(1 + layer % 3, 1, 1) for layer in range(layers)], devices, 10.0))

    assert work(24, 8) < 20 * work(12, 4)


def test_a_large_model_is_cut_no_better_than_evenly():
    found = partition([Layer(1 + layer % 3, 1, 1) for layer in range(48)], 16, 10.0)
    assert found.seconds >= sum(1 + layer % 3 for layer in range(48)) / 16


@pytest.mark.parametrize(("layers", "devices", "bandwidth"), [(0, 1, 1.0), (1, 0, 1.0), (1, 1, 0.0)])
def test_nothing_makes_no_pipeline(layers, devices, bandwidth):
    with pytest.raises(UsageError, match="make no pipeline"):
        partition([Layer(1, 1, 1)] * layers, devices, bandwidth)
