"""V-shaped schedules whose building block is chosen by times and memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from pydantic import Field

from penstock.pipeline.ir.schedule import Schedule, zigzag
from penstock.pipeline.ordering import local_search
from penstock.pipeline.ordering.building_block import repeat, v_shaped_block
from penstock.pipeline.ordering.words import Problem, Word, to_schedule, to_words
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.pipeline.simulate.times import Times
from penstock.policy import policy

#: The paces of V-Min, V-Half and V-ZB, and then others with which passes do not collide, whatever p is.
NAMED = ((1, 1), (2, 1), (4, 2))
PACES = (*NAMED, (1, 2), (2, 2), (3, 1), (1, 3), (3, 3), (2, 4), (5, 1), (1, 5), (4, 4))
#: Tasks that may be placed, over all blocks; the named ones are always tried.
BLOCK_TASKS = 10_000


@policy("pipeline.schedule", "v_auto", papers=[21])
class VAuto(PipelineSchedule):
    """The V-shaped block that is fastest at the given ``times`` within ``memory``, improved by a local search.

    ``memory`` is the most that a device may hold, in activations of one microbatch on a p-th of the model (two of its
    stages); by default p, what 1F1B's first device holds. Blocks differ in the pace at which passes go down and up the
    devices, which decides both memory and how well the schedule bears times that are not equal: V-Min's drifts apart
    where V-Half's does not. That blocks are enumerated under a limit is the paper's; that they are compared at their
    times on so many microbatches, and the local search from the best of them, is ours. So it is never behind ``v_min``,
    ``v_half`` and ``v_zb`` where these fit. With less memory than V-Min needs, it flushes as often as it must.
    """

    times: Times = Times()
    memory: float | None = Field(None, ge=1)

    def arrange(self, devices: int, microbatches: int) -> Schedule:
        stages = 2 * devices
        problem = Problem(
            placement=zigzag(devices, 2),
            forward=self.times.each("forward", stages, 0.5),
            input_grad=self.times.each("input_grad", stages, 0.5),
            weight_grad=self.times.each("weight_grad", stages, 0.5),
            transfer=self.times.transfer,
            memory=2 * (self.memory or devices),
            deferred=self.times.deferred,
            microbatches=microbatches,
        )
        starts = list(_starts(problem)) or [_flushing(problem)]
        return to_schedule(problem, local_search.search(problem, starts))


def _starts(problem: Problem) -> Iterator[list[Word]]:
    """The words of all blocks that fit."""
    tasks = 6 * problem.devices * problem.microbatches
    for pace in PACES[: max(len(NAMED), BLOCK_TASKS // tasks)]:
        words = _words(problem, pace, problem.microbatches)
        if problem.fits(problem.peak(words)):
            yield words


def _flushing(problem: Problem) -> list[Word]:
    """V-Min in rounds of as many microbatches as fit."""
    size = next(
        count
        for count in range(min(problem.microbatches, 2 * problem.devices), 0, -1)
        if problem.fits(problem.peak(_words(problem, NAMED[0], count)))
    )
    rounds = [
        _words(problem, NAMED[0], min(size, problem.microbatches - k)) for k in range(0, problem.microbatches, size)
    ]
    return [list(itertools.chain(*own)) for own in zip(*rounds, strict=True)]


def _words(problem: Problem, pace: tuple[int, int], microbatches: int) -> list[Word]:
    return to_words(problem, repeat(v_shaped_block(problem.devices, pace * 2), microbatches))
