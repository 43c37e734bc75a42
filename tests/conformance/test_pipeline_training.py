"""What is registered trains, as one device does: every schedule, route and transform of a pipeline."""

from __future__ import annotations

import pytest

from penstock.testing.enrolled import enrolled
from penstock.testing.pipeline_schedule import variants
from penstock.testing.pipeline_training import check_trains

CONTRACTS = ("pipeline.schedule", "pipeline.route", "pipeline.transform")


def policies(contract: str):
    return {f"{name}, variant {i}": v for name, p in enrolled(contract).items() for i, v in enumerate(variants(p))}


@pytest.mark.parametrize("contract", CONTRACTS)
def test_what_is_registered_trains_as_one_device_does(contract):
    """With default options; routes on four devices, which all of them can have."""
    check_trains(enrolled(contract), 4 if contract == "pipeline.route" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("contract", CONTRACTS)
def test_every_option_trains_as_one_device_does(contract, size):
    check_trains(policies(contract), size)
