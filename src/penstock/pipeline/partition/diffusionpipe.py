"""DiffusionPipe's stage partition: one trained backbone, or two of a cascade in opposite directions.

The devices are a row of positions. A position holds a stage of each backbone: of the first one in order, of the second
one from its end on, so that both pipelines run through the same devices at the same time. On a position of several
devices, each of them works on its share of every microbatch, and they exchange gradients at the end of the step.

That one dynamic program finds cuts and numbers of devices for both cases, against the slowest stage and the exchange,
is the paper's. The formula of the time is our reading: (m + S - 1) times the slowest position, as for 1F1B on even
stages, and then the longest exchange, of which nothing is hidden.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from penstock.core.errors import UsageError
from penstock.pipeline.partition.pipedream import Layer, boundary_seconds


@dataclasses.dataclass(frozen=True)
class Position:
    """``replicas`` devices, and for each backbone the range of layers that they hold."""

    layers: tuple[range, ...]
    replicas: int


@dataclasses.dataclass(frozen=True)
class Backbones:
    """Positions in the order of the first backbone, and the seconds of a step."""

    positions: tuple[Position, ...]
    seconds: float


#: (slowest position, longest exchange, positions) of one way to partition.
_Way = tuple[float, float, tuple[Position, ...]]


def partition(
    backbones: Sequence[Sequence[Layer]], devices: int, stages: int, microbatches: int, bandwidth: float
) -> Backbones:
    """The cuts and numbers of devices with the shortest step.

    Exact: the dynamic program over positions, cuts and devices left keeps all ways that no other one beats in both the
    slowest position and the longest exchange, since the two add up with different weights. Its time grows with the
    square of the layers of each backbone and of the devices.

    Args:
        backbones: the layers of one or two backbones; their seconds are those of a microbatch.
        devices: all of which are used.
        stages: S, of each backbone.
        microbatches: m, of each backbone, in a step.
        bandwidth: bytes a second between devices.

    Raises:
        UsageError: there are fewer layers or devices than stages, or not one or two backbones.
    """
    least = min(map(len, backbones), default=0)
    if not (1 <= len(backbones) <= 2 and 1 <= stages <= min(devices, least) and microbatches >= 1 and bandwidth > 0):
        raise UsageError(
            f"{len(backbones)} backbones of {least} or more layers make no pipeline of {stages} stages and "
            f"{microbatches} microbatches on {devices} devices at {bandwidth:g} bytes a second",
            hint="Give one or two backbones, each with a layer for every stage, and a device for every stage.",
        )
    # The second backbone from its end on is a backbone in order, but for the side on which its layers hand over.
    handing = [[boundary_seconds(layer, bandwidth) for layer in backbones[0]]]
    layers = [list(backbones[0])]
    if len(backbones) == 2:
        layers.append(list(backbones[1])[::-1])
        handing.append([boundary_seconds(layer, bandwidth) for layer in layers[1][1:]] + [0.0])

    def position(ranges: tuple[range, ...], replicas: int) -> tuple[float, float]:
        """Seconds of a microbatch, with the slowest handing over to the next position, and of the exchange."""
        held = [own[r.start : r.stop] for own, r in zip(layers, ranges, strict=True)]
        work = sum(layer.seconds for own in held for layer in own) / replicas
        ends = [(own, r.stop) for own, r in zip(handing, ranges, strict=True) if r.stop < len(own)]
        weights = sum(layer.weights for own in held for layer in own)
        return max([work, *(own[stop - 1] for own, stop in ends)]), 2 * (replicas - 1) / replicas * weights / bandwidth

    @functools.cache
    def best(starts: tuple[int, ...], left: int, count: int) -> list[_Way]:
        """The ways that matter for the layers from ``starts`` on, in ``left`` positions on ``count`` devices."""
        if left == 1:
            ranges = tuple(range(start, len(own)) for start, own in zip(starts, layers, strict=True))
            return [(*position(ranges, count), (Position(ranges, count),))]
        found: list[_Way] = []
        for stops in _stops(starts, [len(own) - left + 1 for own in layers]):
            ranges = tuple(range(start, stop) for start, stop in zip(starts, stops, strict=True))
            for replicas in range(1, count - left + 2):
                slowest, exchange = position(ranges, replicas)
                here = Position(ranges, replicas)
                found += [
                    (max(slowest, slow), max(exchange, long), (here, *rest))
                    for slow, long, rest in best(stops, left - 1, count - replicas)
                ]
        return _undominated(found)

    rounds = microbatches + stages - 1
    ways = best((0,) * len(layers), stages, devices)
    slow, long, positions = min(ways, key=lambda way: rounds * way[0] + way[1])
    return Backbones(tuple(_forward(position, layers) for position in positions), rounds * slow + long)


def _stops(starts: tuple[int, ...], limits: Sequence[int]) -> list[tuple[int, ...]]:
    """All ends of a stage that begins at ``starts``: a layer or more of each backbone, up to the limits."""
    ends: list[tuple[int, ...]] = [()]
    for start, limit in zip(starts, limits, strict=True):
        ends = [(*end, stop) for end in ends for stop in range(start + 1, limit + 1)]
    return ends


def _undominated(ways: list[_Way]) -> list[_Way]:
    """Those that no other one beats in both times, or equals in both and comes first."""
    kept: list[_Way] = []
    for way in sorted(ways, key=lambda way: way[:2]):
        if not kept or way[1] < kept[-1][1]:
            kept.append(way)
    return kept


def _forward(position: Position, layers: Sequence[Sequence[Layer]]) -> Position:
    """The position with the layers of the second backbone in their own order."""
    first, *second = position.layers
    turned = (range(len(layers[1]) - r.stop, len(layers[1]) - r.start) for r in second)
    return dataclasses.replace(position, layers=(first, *turned))
