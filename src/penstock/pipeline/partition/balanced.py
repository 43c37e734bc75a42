"""Layers cut into stages of even cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from penstock.core.errors import UsageError
from penstock.models.config import DecoderConfig


def balanced(costs: Sequence[float], stages: int, *, first: float = 0.0, last: float = 0.0) -> list[range]:
    """Cuts layers into contiguous stages of one layer or more whose most expensive one costs as little as possible.

    Exact, by dynamic programming. Of equally good cuts, the one whose last stages are smaller, since the head's loss
    comes on top of them.

    Args:
        costs: of each layer, in any unit.
        stages: S >= 1.
        first: what the first stage costs besides its layers: the embedding.
        last: what the last one does: norm, head and loss.

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
    best = [first + cost for cost in before]  # best[n]: the most expensive of the stages so far, over the layers 0..n-1
    best[0] = math.inf
    starts: list[list[int]] = []
    for stage in range(1, stages):
        extra = last if stage == stages - 1 else 0.0
        chosen = [0] * (layers + 1)
        worst = [math.inf] * (layers + 1)
        for stop in range(stage + 1, layers + 1):
            worst[stop], negative = min(
                (max(best[start], before[stop] - before[start] + extra), -start) for start in range(stage, stop)
            )
            chosen[stop] = -negative
        best = worst
        starts.append(chosen)
    stops = [layers]
    for chosen in reversed(starts):
        stops.append(chosen[stops[-1]])
    return [range(start, stop) for start, stop in itertools.pairwise([0, *reversed(stops)])]


def counted_costs(config: DecoderConfig, length: int) -> tuple[list[float], float]:
    """Forward FLOPs for a token of each layer, and of the head, in sequences of ``length`` tokens.

    The embedding looks up rows and counts nothing.
    """
    totals = [
        config.model_copy(update={"layers": layers}).flops_per_token(length) for layers in range(config.layers + 1)
    ]
    return [after - before for before, after in itertools.pairwise(totals)], totals[0]


def cut(config: DecoderConfig, stages: int, length: int) -> list[range]:
    """The stages of a Decoder, balanced by counted FLOPs on sequences of ``length`` tokens. See :func:`balanced`."""
    costs, head = counted_costs(config, length)
    return balanced(costs, stages, last=head)
