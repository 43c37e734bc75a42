"""The law of ``pipeline.route``."""

from __future__ import annotations

from collections import Counter

from penstock.pipeline.ir.refusal import RefusalError
from penstock.pipeline.ir.validate import validate
from penstock.pipeline.routes.contract import PipelineRoute
from penstock.testing.enrolled import rebuilt
from penstock.testing.pipeline_schedule import check_complete, check_simulation, run_by_rounds


def check_route(policy: PipelineRoute, devices: int, microbatches: int) -> None:
    """Asserts the law for one pair of numbers. Where the policy refuses, for the pair that the refusal names."""
    try:
        schedule = policy.build(devices, microbatches)
    except RefusalError as refusal:
        assert (refusal.devices, refusal.microbatches) != (devices, microbatches)
        devices, microbatches = refusal.devices, refusal.microbatches
        schedule = policy.build(devices, microbatches)
    assert rebuilt(policy).build(devices, microbatches) == schedule, "the paths depend on more than the options"
    assert len(schedule.paths) == microbatches
    for path in schedule.paths:
        assert len(path) == len(set(path)) == policy.length(devices)
        assert set(path) <= set(range(devices))
    served = Counter(stage for path in schedule.paths for stage in path)
    sometimes = [served[stage] for stage in range(devices) if served[stage] < microbatches]
    assert not sometimes or max(sometimes) - min(sometimes) <= 2, served
    check_complete(schedule)
    assert run_by_rounds(schedule) == [], "deadlock"
    validate(schedule)
    check_simulation(schedule)
