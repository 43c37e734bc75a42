"""The law of ``pipeline.transform``, for every registered policy; test_pipeline_training.py trains."""

from __future__ import annotations

import pytest

from penstock.testing.enrolled import enrolled
from penstock.testing.pipeline_transform import check_schedules

POLICIES = enrolled("pipeline.transform")


@pytest.mark.parametrize("name", POLICIES)
def test_the_law_of_transforms_holds(name: str) -> None:
    check_schedules(POLICIES[name], draws=8, processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_the_law_holds_for_many_times_and_on_more_processes(name: str) -> None:
    check_schedules(POLICIES[name], draws=150, processes=4)
