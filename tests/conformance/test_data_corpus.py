"""The law of ``data.corpus``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.testing.data_corpus import check
from penstock.testing.enrolled import enrolled

POLICIES = enrolled("data.corpus")


@pytest.mark.parametrize("name", POLICIES)
def test_the_law_of_corpora_holds(name: str) -> None:
    check(POLICIES[name], most=200)
