"""The law of ``train.schedule``."""

from __future__ import annotations

import itertools
import math

from penstock.testing.enrolled import rebuilt
from penstock.train.schedules.contract import Schedule

#: Totals that a run may announce; with a time budget they are fractional, and huge before the first update.
TOTALS = (1, 2, 7.5, 100, 1000, 1e9)


def check_schedule(schedule: Schedule) -> None:
    """Asserts the law of ``train.schedule``, with and without a warm-up."""
    for warmup_steps in (0, 1, 10, 200):
        candidate = schedule.model_copy(update={"warmup_steps": warmup_steps})
        check_range_and_purity(candidate)
        check_warmup(candidate)
    for share, total in itertools.product((0.01, 0.1, 0.5), TOTALS):
        relative = schedule.model_copy(update={"warmup": share, "warmup_steps": 0})
        counted = schedule.model_copy(update={"warmup_steps": round(share * total)})
        for step in {0, 1, 9, int(share * total), int(total) - 1}:
            assert relative.factor(step, total) == counted.factor(step, total), f"a share of {share} at {(step, total)}"


def check_range_and_purity(schedule: Schedule) -> None:
    """The factor lies within [0, 1] whatever the step and total, and depends on nothing else."""
    asked = [
        (step, total) for total in TOTALS for step in {0, 1, 9, 10, 50, int(total) - 1, int(total), int(2 * total)}
    ]
    first = {question: schedule.factor(*question) for question in asked}
    for question, factor in first.items():
        assert 0 <= factor <= 1, f"the factor of (step, total) = {question} is {factor}"
    again = rebuilt(schedule)
    for question in reversed(asked):
        assert schedule.factor(*question) == again.factor(*question) == first[question], f"at {question}"


def check_warmup(schedule: Schedule) -> None:
    """The warm-up does not depend on the total, and is a straight line that would reach 1 at step ``warmup_steps``."""
    steps = range(schedule.warmup_steps)
    for step, (total, other) in itertools.product(steps, itertools.pairwise(TOTALS)):
        assert schedule.factor(step, total) == schedule.factor(step, other)
    if not steps:
        return
    slope = (1 - schedule.factor(0, 1000)) / schedule.warmup_steps
    assert slope >= 0
    for step in steps:
        line = 1 - slope * (schedule.warmup_steps - step)
        assert math.isclose(schedule.factor(step, 1000), line, abs_tol=1e-12), f"step {step} leaves the line"


def check_branch(schedule: Schedule, branch: int, long: int, short: int) -> None:
    """A run of ``long`` updates that is resumed after ``branch`` of them with the total ``short`` is the short run."""
    shared = [schedule.factor(step, long) for step in range(branch)]
    assert shared == [schedule.factor(step, short) for step in range(branch)]
