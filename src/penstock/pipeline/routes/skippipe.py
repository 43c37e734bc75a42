"""SkipPipe: each microbatch skips some stages, on paths that do not collide."""

from __future__ import annotations

import math
from typing import Self

from pydantic import Field

from penstock.pipeline.routes.contract import PipelineRoute
from penstock.policy import policy

#: Added to the cost of a path for each pair of stages that it passes in swapped order: that comes last.
_SWAP = 1e-3


@policy("pipeline.route", "skippipe", papers=[4])
class SkipPipe(PipelineRoute):
    """Of S stages each microbatch passes ceil((1 - ``skip``) S): the first, the last, and some between, in order or
    with neighbours on its path swapped.

    Paths are planned one microbatch after the other, with a forward as the unit of time: each begins as soon as it can,
    meets no earlier one on any device at any time, and prefers the stages that have served the fewest. A ratio of
    skipped stages, paths without collisions, and few swaps are the paper's; it finds the paths by a search over
    conflicts and for the times of uneven links, we by planning in turn and for even ones. That the ends are never
    skipped, as embedding and head are there, is our reading. Not built: answers from a model whose stages are skipped.
    """

    skip: float = Field(0.25, ge=0, lt=1)

    def length(self, stages: int) -> int:
        return max(min(stages, 2), math.ceil((1 - self.skip) * stages - 1e-9))

    def paths(self, stages: int, microbatches: int) -> tuple[tuple[int, ...], ...]:
        taken: set[tuple[int, int]] = set()  # (stage, unit of time)
        served = [0] * stages
        paths = []
        start = 0
        for _ in range(microbatches):
            path = None
            while path is None:
                path = _best(stages, self.length(stages), start, taken, served)
                start += 1  # the first stage takes one microbatch a unit
            paths.append(path)
            for time, stage in enumerate(path, start - 1):
                taken.add((stage, time))
                served[stage] += 1
        return tuple(paths)

    @classmethod
    def example(cls) -> tuple[Self, int, tuple[tuple[int, ...], ...]]:
        # The two stages between the ends take turns, so that each follows the other without meeting it.
        return cls(skip=0.25), 4, ((0, 1, 3), (0, 2, 3), (0, 1, 3), (0, 2, 3))


def _best(
    stages: int, length: int, start: int, taken: set[tuple[int, int]], served: list[int]
) -> tuple[int, ...] | None:
    """The path from ``start`` on whose stages have served the least; None if on every one a device is taken.

    A dynamic program over the length: ``reached[n]`` has, for each stage as the furthest of n, the cheapest such path
    and its cost. A step adds a stage, or two neighbours swapped.
    """
    reached: list[dict[int, tuple[float, tuple[int, ...]]]] = [{} for _ in range(length + 1)]
    reached[1][0] = 0.0, (0,)
    for count in range(1, length):
        for furthest, (cost, path) in reached[count].items():
            steps: list[tuple[int, ...]] = [(stage,) for stage in range(furthest + 1, stages)]
            steps += [(early + 1, early) for early in range(furthest + 1, stages - 2)]
            for step in steps:
                after = count + len(step)
                # The last stage ends a path, and nothing else does.
                if after > length or (max(step) == stages - 1) != (after == length):
                    continue
                if any((stage, start + count + place) in taken for place, stage in enumerate(step)):
                    continue
                spent = cost + sum(2 * served[stage] + 1 for stage in step) + _SWAP * (len(step) - 1)
                known = reached[after].get(max(step))
                if known is None or spent < known[0]:
                    reached[after][max(step)] = spent, (*path, *step)
    found = reached[length].get(stages - 1)
    return None if found is None else found[1]
