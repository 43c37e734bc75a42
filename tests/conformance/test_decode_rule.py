"""The law of ``decode.rule``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.testing.decode_rule import check
from penstock.testing.enrolled import enrolled, rebuilt

POLICIES = enrolled("decode.rule")


@pytest.mark.parametrize("name", POLICIES)
def test_the_law_of_decoding_rules_holds(name: str) -> None:
    check(POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_a_rule_can_be_made_from_its_description(name: str) -> None:
    rebuilt(POLICIES[name])
    rebuilt(POLICIES[name].limit().rule)
