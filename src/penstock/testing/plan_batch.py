"""The law of ``plan.batch``."""

from __future__ import annotations

import pytest

from penstock.core.errors import UsageError
from penstock.plan.batch.contract import BatchAdvisor, Curve


def check_advisor(advisor: BatchAdvisor, curve: Curve, slowest: float | None) -> None:
    """Asserts the law of ``plan.batch`` for one curve, whose every batch is tried."""
    allowed = [batch for batch in range(1, curve.largest + 1) if slowest is None or curve.seconds(batch) <= slowest]
    if not allowed:
        with pytest.raises(UsageError, match="even one sequence"):
            advisor.advise(curve, slowest)
        return
    advice = advisor.advise(curve, slowest)
    assert advice.batch in allowed
    assert advice.seconds == curve.seconds(advice.batch)
    assert advice.throughput == advice.batch / advice.seconds
    assert advice.ceiling == pytest.approx(max(batch / curve.seconds(batch) for batch in allowed))
