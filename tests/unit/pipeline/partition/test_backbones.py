"""DiffusionPipe's partition against all partitions there are."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import UsageError
from penstock.pipeline.partition.diffusionpipe import Position, partition
from penstock.pipeline.partition.pipedream import Layer

NUMBERS = st.integers(0, 9).map(float)
LAYER = st.builds(Layer, NUMBERS, NUMBERS, NUMBERS)


def cuts(layers: int, stages: int) -> list[list[range]]:
    inner = itertools.combinations(range(1, layers), stages - 1)
    return [[range(a, b) for a, b in itertools.pairwise((0, *stops, layers))] for stops in inner]


def seconds(backbones, positions: list[Position], microbatches: int, bandwidth: float) -> float:
    """From the formulas: stage k of the first and stage S-1-k of the second are together; every handing over counts
    for the position before it in the row."""
    slowest = longest = 0.0
    for number, position in enumerate(positions):
        held = [backbone[r.start : r.stop] for backbone, r in zip(backbones, position.layers, strict=True)]
        period = sum(layer.seconds for own in held for layer in own) / position.replicas
        if number < len(positions) - 1:
            period = max(period, 2 * held[0][-1].activation / bandwidth)
            if len(backbones) == 2:  # its stage there gets its input from the next position
                before = backbones[1][position.layers[1].start - 1]
                period = max(period, 2 * before.activation / bandwidth)
        weights = sum(layer.weights for own in held for layer in own)
        slowest = max(slowest, period)
        longest = max(longest, 2 * (position.replicas - 1) / position.replicas * weights / bandwidth)
    return (microbatches + len(positions) - 1) * slowest + longest


def everything(backbones, devices: int, stages: int, microbatches: int, bandwidth: float) -> float:
    """The least over all cuts of each backbone and all numbers of devices."""
    options = [cuts(len(backbones[0]), stages)]
    if len(backbones) == 2:
        options.append([cut[::-1] for cut in cuts(len(backbones[1]), stages)])
    replicas = [r for r in itertools.product(range(1, devices + 1), repeat=stages) if sum(r) == devices]
    return min(
        seconds(
            backbones,
            [Position(*each) for each in zip(zip(*cut, strict=True), r, strict=True)],
            microbatches,
            bandwidth,
        )
        for cut in itertools.product(*options)
        for r in replicas
    )


@settings(max_examples=60)
@given(
    backbones=st.lists(st.lists(LAYER, min_size=3, max_size=5), min_size=1, max_size=2),
    stages=st.integers(1, 3),
    spare=st.integers(0, 2),
    microbatches=st.integers(1, 6),
    bandwidth=st.sampled_from([0.5, 2.0, 1e6]),
)
def test_no_partition_is_faster(backbones, stages, spare, microbatches, bandwidth):
    devices = stages + spare
    found = partition(backbones, devices, stages, microbatches, bandwidth)
    expected = everything(backbones, devices, stages, microbatches, bandwidth)
    assert found.seconds == pytest.approx(expected, rel=1e-12)
    assert seconds(backbones, list(found.positions), microbatches, bandwidth) == pytest.approx(expected, rel=1e-12)
    assert sum(position.replicas for position in found.positions) == devices
    for number, backbone in enumerate(backbones):
        order = [position.layers[number] for position in found.positions][:: -1 if number else 1]
        assert [layer for held in order for layer in held] == list(range(len(backbone)))


@given(layers=st.lists(LAYER, min_size=10, max_size=10), stages=st.integers(1, 4))
@settings(max_examples=15)
def test_ten_layers_on_one_device_a_stage(layers, stages):
    found = partition([layers], stages, stages, 4, 3.0)
    assert found.seconds == pytest.approx(everything([layers], stages, stages, 4, 3.0), rel=1e-12)


def test_two_backbones_balance_each_other():
    """One is heavy at its end, and so is the other: in opposite directions, each position gets a heavy part."""
    heavy_last = [Layer(1.0, 0.0, 0.0), Layer(3.0, 0.0, 0.0)]
    found = partition([heavy_last, heavy_last], 2, 2, 3, 1.0)
    assert found.positions == (Position((range(1), range(1, 2)), 1), Position((range(1, 2), range(1)), 1))
    assert found.seconds == (3 + 1) * 4.0


@pytest.mark.parametrize(
    ("backbones", "devices", "stages", "microbatches", "bandwidth"),
    [(0, 2, 2, 1, 1.0), (3, 2, 2, 1, 1.0), (1, 1, 2, 1, 1.0), (1, 9, 4, 1, 1.0), (1, 2, 2, 0, 1.0), (1, 2, 2, 1, 0.0)],
)
def test_what_makes_no_pipeline(backbones, devices, stages, microbatches, bandwidth):
    with pytest.raises(UsageError, match="make no pipeline of"):
        partition([[Layer(1, 1, 1)] * 3] * backbones, devices, stages, microbatches, bandwidth)
