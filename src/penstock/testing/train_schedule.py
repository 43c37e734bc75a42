"""The law of ``train.schedule``.

Bugs that its clauses are there to catch:

- the example: another curve than the paper's, a constant one too; a floor, a decay or a total that is off by one.
- lengths: a curve that is right for runs as long as the example alone, such as one that does not fall in longer runs,
  or is off by one there.
- range: a factor below 0 or above 1 once the run is longer than its total, or the total less than an update.
- purity: state that a call leaves behind, or that an option does not hold, so that a resumed run sees other factors.
- warm-up: a jump at its end; a slope that depends on the total, so that runs of other lengths begin differently.
"""

from __future__ import annotations

import itertools
import math

from penstock.core.randomness import numpy_generator
from penstock.testing.enrolled import rebuilt
from penstock.train.schedules.contract import Schedule

#: Totals that a run may announce; with a time budget they are fractional, and huge before the first update.
TOTALS = (1, 2, 7.5, 100, 1000, 1e9)


def check(schedule: Schedule) -> None:
    """Asserts the law of ``train.schedule``, with and without a warm-up."""
    check_example(schedule)
    check_lengths(schedule)
    for warmup_steps in (0, 1, 10, 200):
        candidate = schedule.model_copy(update={"warmup_steps": warmup_steps})
        check_range_and_purity(candidate)
        check_warmup(candidate)
    for share, total in itertools.product((0.01, 0.1, 0.5), TOTALS):
        relative = schedule.model_copy(update={"warmup": share, "warmup_steps": 0})
        counted = schedule.model_copy(update={"warmup_steps": round(share * total)})
        for step in {0, 1, 9, int(share * total), int(total) - 1}:
            assert relative.factor(step, total) == counted.factor(step, total), f"a share of {share} at {(step, total)}"
    check_any_numbers(schedule)


def check_example(schedule: Schedule) -> None:
    """Over one run the factors are those that the policy gives."""
    example, factors = schedule.example()
    total = len(factors) - 1
    assert total >= 3, f"the example is a run of {total} updates, and so short a one says little"
    for step, factor in enumerate(factors):
        found = example.factor(step, total)
        assert math.isclose(found, factor, rel_tol=1e-9, abs_tol=1e-12), (
            f"the factor at step {step} of {total} is {found}, and {factor} in the example"
        )


def check_lengths(schedule: Schedule) -> None:
    """A longer run is a shorter one drawn out: the example's factors return in runs of other lengths, and those of the
    schedule itself, at each update behind the warm-up, in runs of several times as many."""
    example, factors = schedule.example()
    _check_drawn_out(example, factors, (2, 3, 10, 1000))
    for length, times in itertools.product((3, 5, 8, 24, 150), (2, 7)):
        _check_drawn_out(schedule, [schedule.factor(step, length) for step in range(length + 1)], (times,))


def _check_drawn_out(schedule: Schedule, factors: list[float], times: tuple[int, ...]) -> None:
    """Asserts that the run whose updates have these ``factors`` can be drawn out so many ``times``."""
    total = len(factors) - 1
    for many in times:
        longer = schedule.drawn_out(many)
        for step in range(schedule.warmup_updates(total), total + 1):
            found, wanted = longer.factor(many * step, many * total), factors[step]
            assert math.isclose(found, wanted, rel_tol=1e-9, abs_tol=1e-9), (
                f"the factor at step {many * step} of {many * total} is {found}, and {wanted} at step {step} of {total}"
            )


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


def check_any_numbers(schedule: Schedule) -> None:
    """The factor lies within [0, 1] for numbers of any size."""
    draw = numpy_generator(0, "testing/train.schedule")
    for _ in range(200):
        step, total = int(10 ** draw.uniform(0, 12)) - 1, 10 ** draw.uniform(-3, 12)
        candidate = schedule.model_copy(update={"warmup_steps": int(10 ** draw.uniform(0, 6)) - 1})
        factor = candidate.factor(step, total)
        assert 0 <= factor <= 1, f"the factor of {candidate!r} at step {step} of {total} is {factor}"


def check_warmup(schedule: Schedule) -> None:
    """The warm-up does not depend on the total, and is a straight line that would reach 1 at step ``warmup_steps``."""
    steps = range(schedule.warmup_steps)
    for step, (total, other) in itertools.product(steps, itertools.pairwise(TOTALS)):
        assert schedule.factor(step, total) == schedule.factor(step, other), f"step {step} depends on the total"
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
