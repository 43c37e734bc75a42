"""The law of ``model.encoder``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.testing.enrolled import enrolled
from penstock.testing.model_encoder import check

POLICIES = enrolled("model.encoder")


@pytest.mark.parametrize("name", POLICIES)
def test_the_law_of_encoders_holds(name: str) -> None:
    check(POLICIES[name])
