"""The law of ``pipeline.route``, for every registered policy; test_pipeline_training.py has the part that trains."""

from __future__ import annotations

import pytest

from penstock.testing.enrolled import enrolled
from penstock.testing.pipeline_route import check_paths

POLICIES = enrolled("pipeline.route")


@pytest.mark.parametrize("name", POLICIES)
def test_the_law_of_routes_holds(name: str) -> None:
    check_paths(POLICIES[name])
