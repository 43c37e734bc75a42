"""Layers cut into stages of even cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from penstock.core.errors import UsageError

if TYPE_CHECKING:  # it needs PyTorch, which plans do without
    from penstock.models.config import DecoderConfig


def balanced(
    costs: Sequence[float],
    stages: int,
    *,
    first: float = 0.0,
    last: float = 0.0,
    speeds: Sequence[float] | None = None,
) -> list[range]:
    """Cuts layers into contiguous stages of one layer or more whose most expensive one costs as little as possible.

    Of equally good cuts, one that needs the least memory where it needs most: as in 1F1B, stage s of S holds the
    activations of S - s microbatches, each for all of its layers. Exact, by dynamic programming.

    Args:
        costs: of each layer, in any unit; what a layer's activations take is proportional to it.
        stages: S >= 1.
        first: what the first stage costs besides its layers: the embedding.
        last: what the last one does: norm, head and loss.
        speeds: of the device of each stage, relative to the others; all alike if not given.

    Raises:
        UsageError: there are fewer layers than stages.
    """
    layers = len(costs)
    if not 1 <= stages <= layers:
        raise UsageError(
            f"{layers} layers cannot be cut into {stages} stages of one or more",
            hint=f"Use a schedule with 1 to {layers} stages in all, or a model with {max(stages, 1)} layers.",
        )
    before = [0.0, *itertools.accumulate(costs)]

    def cost(stage: int, start: int, stop: int) -> float:
        work = before[stop] - before[start] + first * (stage == 0) + last * (stage == stages - 1)
        return work if speeds is None else work / speeds[stage]

    most, _ = _least_of_the_most(layers, stages, cost)

    def held(stage: int, start: int, stop: int) -> float:
        return math.inf if cost(stage, start, stop) > most else (stages - stage) * (before[stop] - before[start])

    _, found = _least_of_the_most(layers, stages, held)
    return found


def _least_of_the_most(layers: int, stages: int, value: Callable[[int, int, int], float]) -> tuple[float, list[range]]:
    """The cut of ``layers`` whose largest ``value`` of a stage, given its number, first layer and end, is the smallest,
    after that value."""
    best = [math.inf, *(value(0, 0, stop) for stop in range(1, layers + 1))]  # of the stages so far, by their end
    starts: list[list[int]] = []
    for stage in range(1, stages):
        chosen, worst = [0] * (layers + 1), [math.inf] * (layers + 1)
        for stop in range(stage + 1, layers + 1):
            worst[stop], chosen[stop] = min(
                (max(best[start], value(stage, start, stop)), start) for start in range(stage, stop)
            )
        best = worst
        starts.append(chosen)
    stops = [layers]
    for chosen in reversed(starts):
        stops.append(chosen[stops[-1]])
    return best[layers], [range(start, stop) for start, stop in itertools.pairwise([0, *reversed(stops)])]


def counted_costs(config: DecoderConfig, length: int) -> tuple[list[float], float]:
    """Forward FLOPs for a token of each layer, and of the head, in sequences of ``length`` tokens.

    The embedding looks up rows and counts nothing.
    """
    totals = [
        config.model_copy(update={"layers": layers}).flops_per_token(length) for layers in range(config.layers + 1)
    ]
    return [after - before for before, after in itertools.pairwise(totals)], totals[0]


def cut(config: DecoderConfig, stages: int, length: int, speeds: Sequence[float] | None = None) -> list[range]:
    """The stages of a Decoder, balanced by counted FLOPs on sequences of ``length`` tokens. See :func:`balanced`."""
    costs, head = counted_costs(config, length)
    return balanced(costs, stages, last=head, speeds=speeds)
