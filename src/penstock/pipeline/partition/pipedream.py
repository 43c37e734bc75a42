"""PipeDream's partitioner: which layers make a stage, and on how many devices each stage runs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

from penstock.core.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Layer:
    """What a profile says of a layer.

    Attributes:
        seconds: of forward and backward of one minibatch on one device.
        activation: bytes that it hands to the next layer.
        weights: bytes of its weights.
    """

    seconds: float
    activation: float
    weights: float


@dataclasses.dataclass(frozen=True)
class Stage:
    """Layers ``first`` to ``last`` - 1 on ``replicas`` devices."""

    first: int
    last: int
    replicas: int


@dataclasses.dataclass(frozen=True)
class Partition:
    """Stages in order, and the seconds between two minibatches in the steady state: those of the slowest part."""

    stages: tuple[Stage, ...]
    seconds: float


def stage_seconds(layers: Sequence[Layer], replicas: int, bandwidth: float) -> float:
    """Seconds a minibatch of a stage: work, or the exchange of gradients that it hides, over ``replicas``.

    The exchange is the paper's: each of r replicas sends and receives 4 (r-1)/r times the weights for a round of r
    minibatches, at ``bandwidth`` bytes a second.
    """
    work = sum(layer.seconds for layer in layers)
    exchange = 4 * (replicas - 1) * sum(layer.weights for layer in layers) / (replicas * bandwidth)
    return max(work, exchange) / replicas


def boundary_seconds(layer: Layer, bandwidth: float) -> float:
    """Seconds a minibatch between ``layer`` and the next stage: an activation forward, and its gradient back."""
    return 2 * layer.activation / bandwidth


def partition(layers: Sequence[Layer], devices: int, bandwidth: float, most: int | None = None) -> Partition:
    """The stages that use all ``devices`` with the least time of the slowest stage or boundary.

    The paper's dynamic program for one level of links: the best for the first j layers on m devices is one stage, or
    the best for the first i layers on m - r devices, the boundary after layer i, and a stage of the rest on r. Time
    grows with (layers x devices) squared. No stage has more than ``most`` devices, if that is given.

    Raises:
        UsageError: there are no layers or no devices, or fewer layers than stages; or the bandwidth is not positive.
    """
    limit = devices if most is None else most
    if not layers or devices < 1 or not bandwidth > 0:
        raise UsageError(
            f"{len(layers)} layers on {devices} devices at {bandwidth} bytes a second make no pipeline",
            hint="Give one or more layers and devices, and a positive bandwidth.",
        )

    @functools.cache
    def stage(first: int, last: int, replicas: int) -> float:
        return stage_seconds(layers[first:last], replicas, bandwidth)

    @functools.cache
    def best(last: int, count: int) -> tuple[float, int, int, int]:
        """(seconds, stages, where the last stage begins, its replicas) of the best for the first layers."""
        options = [(stage(0, last, count) if count <= limit else math.inf, 1, 0, count)]
        for cut, replicas in itertools.product(range(1, last), range(1, min(count, limit + 1))):
            seconds, stages, _, _ = best(cut, count - replicas)
            seconds = max(seconds, boundary_seconds(layers[cut - 1], bandwidth), stage(cut, last, replicas))
            options.append((seconds, stages + 1, cut, replicas))
        return min(options)

    for last in range(1, len(layers) + 1):  # from the bottom up, so that the recursion stays shallow
        seconds, *_ = best(last, devices)
    if seconds == math.inf:
        raise UsageError(
            f"{len(layers)} layers cannot be cut into stages for {devices} devices, at most {limit} each",
            hint="Use fewer devices, or allow more for a stage.",
        )
    stages: list[Stage] = []
    last, count = len(layers), devices
    while last:
        _, _, first, replicas = best(last, count)
        stages.insert(0, Stage(first, last, replicas))
        last, count = first, count - replicas
    return Partition(tuple(stages), seconds)
