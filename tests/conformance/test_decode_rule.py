"""The law of ``decode.rule``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.serve.decode.fire import Fire
from penstock.serve.decode.momentum import Momentum
from penstock.serve.decode.uscd import UncertaintyAwareContrast
from penstock.testing.decode_rule import check_rule
from penstock.testing.enrolled import enrolled, rebuilt

POLICIES = enrolled("decode.rule")

# The limiting case of each rule, and options of a request that go with it.
LIMITS = {
    "fire": (Fire(temperature=0.8, top_k=None), {"temperature": 0.8, "top_p": 0.9}),
    "momentum": (Momentum(alpha=0.0), {"temperature": 0.0}),
    "uscd": (UncertaintyAwareContrast(prompt=(3, 1, 2), threshold=0), {"temperature": 0.7, "top_k": 9}),
}


@pytest.mark.parametrize("name", POLICIES)
def test_the_law_of_decoding_rules_holds(name: str) -> None:
    limit, options = LIMITS[name]
    assert limit.policy_name == name
    check_rule(POLICIES[name], limit, options)


@pytest.mark.parametrize("name", POLICIES)
def test_a_rule_can_be_made_from_its_description(name: str) -> None:
    rebuilt(POLICIES[name])
    rebuilt(LIMITS[name][0])
