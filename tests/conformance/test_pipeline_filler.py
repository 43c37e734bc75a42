"""The law of ``pipeline.filler``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.testing.enrolled import enrolled
from penstock.testing.pipeline_filler import check

POLICIES = enrolled("pipeline.filler")


@pytest.mark.parametrize("name", POLICIES)
def test_the_law_of_fillers_holds(name: str) -> None:
    check(POLICIES[name])
