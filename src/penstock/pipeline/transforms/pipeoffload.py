"""PipeOffload: activations wait in host memory, those with the longest lives first."""

from __future__ import annotations

import dataclasses
import itertools
import math

from pydantic import Field

from penstock.pipeline.ir.schedule import Kind, Schedule
from penstock.pipeline.simulate.simulator import Simulation, simulate
from penstock.pipeline.simulate.times import Times
from penstock.pipeline.transforms.contract import PipelineTransform
from penstock.policy import policy

#: Steps in which the bisection looks for the share that costs no time.
PARTS = 128

#: Multiples of it modulo 1 lie far apart.
_GOLDEN = (5**0.5 - 1) / 2


@policy("pipeline.transform", "pipeoffload", papers=[170])
class PipeOffload(PipelineTransform):
    """Offloads up to a ``share`` of all activations, as many as cost no time at the given ``times``.

    All of them where the copies hide behind the work, else a selection: on each device the same part of those with the
    longest time between F and backward, which the paper found to lower the peak more than in proportion. Activations
    for which that time is shorter than the way to the host and back stay. The rule is the paper's; that we stop where
    time would be lost, found by bisection over the simulator, and spread microbatches of equal lives, is ours.
    """

    times: Times = Times()
    share: float = Field(1.0, ge=0, le=1)

    def transform(self, schedule: Schedule) -> Schedule:
        costs = self.times.costs(schedule)
        plain = simulate(schedule, costs)
        longest = [_by_lifespan(plain, device) for device in range(schedule.devices)]

        def offload(parts: int) -> Schedule:
            """Offloads ``parts`` of :data:`PARTS` of the share on each device."""
            chosen = (own[: math.floor(self.share * parts / PARTS * len(own))] for own in longest)
            return dataclasses.replace(schedule, offloaded=frozenset(itertools.chain.from_iterable(chosen)))

        least, most = 0, PARTS  # least costs no time
        while least < most:
            middle = (least + most + 1) // 2
            if simulate(offload(middle), costs).makespan <= plain.makespan * (1 + 1e-12):
                least = middle
            else:
                most = middle - 1
        return offload(least)


def _by_lifespan(simulation: Simulation, device: int) -> list[tuple[int, int]]:
    """(stage, microbatch) whose activations may wait at the host of ``device``, longest first from F to I or B."""
    idle: dict[tuple[int, int], float] = {}
    timed = zip(simulation.schedule.orders[device], simulation.starts[device], simulation.ends[device], strict=True)
    for task, start, end in timed:
        key = task.stage, task.microbatch
        if task.kind is Kind.F:
            idle[key] = -end
        elif task.kind in (Kind.I, Kind.B):
            idle[key] += start
    costs = simulation.costs
    away = [key for key in idle if idle[key] >= 2 * costs.host.seconds(costs.activation[key[0]])]
    return sorted(away, key=lambda key: (-round(idle[key], 9), key[1] * _GOLDEN % 1, key))
