"""The law of ``plan.batch``.

Bugs that its clauses are there to catch:

- the example: a batch at the wrong end of what the rule allows, a share taken of the wrong figure.
- allowed: a batch that does not fit, or is too slow by one; advice where even one sequence is too slow.
- figures: throughput or time of another batch than the one that is advised; a ceiling beyond what is allowed.
"""

from __future__ import annotations

import dataclasses
import math

from penstock.core.errors import UsageError
from penstock.core.randomness import numpy_generator
from penstock.plan.batch.contract import BatchAdvisor, Curve
from penstock.plan.decoding import DecodeCost
from penstock.plan.hardware import Hardware
from penstock.testing.refusals import refused


@dataclasses.dataclass(frozen=True)
class Table:
    """A curve of given ``times`` for 1, 2, ... sequences."""

    times: list[float]

    @property
    def largest(self) -> int:
        return len(self.times)

    def seconds(self, batch: int) -> float:
        return self.times[batch - 1]


def check(advisor: BatchAdvisor) -> None:
    """Asserts the law of ``plan.batch`` on its example and on random devices and models."""
    check_example(advisor)
    draw = numpy_generator(0, "testing/plan.batch")
    for _ in range(60):
        flops, bandwidth, memory = draw.uniform((10, 1, 10), (1000, 100, 1000)).tolist()
        weights, cache, each = draw.uniform((1, 1, 1), (200, 20, 100)).tolist()
        cost = DecodeCost(Hardware(flops=flops, bandwidth=bandwidth, memory=memory), weights, cache, each)
        check_curve(advisor, cost, None)
        check_curve(advisor, cost, 10 ** draw.uniform(-2, 2))


def check_example(advisor: BatchAdvisor) -> None:
    """On one curve the batch is the one that the policy gives."""
    example, seconds, slowest, batch = advisor.example()
    found = example.advise(Table(seconds), slowest).batch
    assert found == batch, f"the advice is a batch of {found}, and {batch} in the example"


def check_curve(advisor: BatchAdvisor, curve: Curve, slowest: float | None) -> None:
    """The law for one curve, whose every batch is tried."""
    allowed = [batch for batch in range(1, curve.largest + 1) if slowest is None or curve.seconds(batch) <= slowest]
    if not allowed:
        with refused(UsageError, "even one sequence"):
            advisor.advise(curve, slowest)
        return
    advice = advisor.advise(curve, slowest)
    assert advice.batch in allowed, f"a batch of {advice.batch} is none of those that are allowed"
    seconds = curve.seconds(advice.batch)
    assert advice.seconds == seconds, f"a batch of {advice.batch} takes {seconds}, not {advice.seconds}"
    assert advice.throughput == advice.batch / seconds, f"the throughput is not {advice.throughput}"
    ceiling = max(batch / curve.seconds(batch) for batch in allowed)
    assert math.isclose(advice.ceiling, ceiling, rel_tol=1e-9), f"the ceiling is {advice.ceiling}, not {ceiling}"
