"""The law of ``pipeline.schedule``, for every registered policy; processes serve all of them one after another."""

from __future__ import annotations

import pytest

from penstock.testing.enrolled import enrolled
from penstock.testing.pipeline_runtime import check_on_ranks
from penstock.testing.pipeline_schedule import SHAPES, check_orders, variants

POLICIES = enrolled("pipeline.schedule")


@pytest.mark.parametrize("name", POLICIES)
def test_the_law_of_schedules_holds(name: str) -> None:
    """For few numbers; all are for ``-m slow``."""
    check_orders(POLICIES[name], SHAPES[:-2], draws=6, most=(5, 12))


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_the_law_holds_for_many_numbers(name: str) -> None:
    check_orders(POLICIES[name])


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_several_processes_compute_what_one_does(size: int) -> None:
    """Those that refuse an odd number of devices are checked with an even one. In the suite they train; see
    ``test_pipeline_training.py``."""
    check_on_ranks(POLICIES, size, 4)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("microbatches", [1, 12])
def test_options_and_numbers(size: int, microbatches: int) -> None:
    policies = {f"{name}, variant {i}": v for name, p in POLICIES.items() for i, v in enumerate(variants(p))}
    check_on_ranks(policies, size, microbatches)
