"""Random cases that are the same each time, for laws that are checked outside of a test suite."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, Phase, settings


def alike(examples: int, **more: Any) -> settings:
    """Settings under which a law plays so many examples, always the same ones, and tells the first that fails as it is:
    making it smaller may take minutes."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        **more,
    )
