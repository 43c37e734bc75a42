"""The law of ``pipeline.route``.

Bugs that its clauses are there to catch:

- the example: other paths than the paper's, such as half of a swap, or every microbatch swapped where half should be.
- paths: a stage twice or none at all, too short a path, more or fewer paths than microbatches.
- service: partial stages of which some do most of the work.
- recovery: a lost stage that is made anew from itself, or from stages that do something else.
- training: a path that begins without the embedding, or ends without a loss; copies of both that drift apart.
- schedule: tasks of stages that are not on the path; devices that wait for each other; times that are not the earliest.
"""

from __future__ import annotations

from collections import Counter

from penstock.core.errors import UsageError
from penstock.core.randomness import numpy_generator
from penstock.pipeline.ir.refusal import RefusalError
from penstock.pipeline.ir.validate import validate
from penstock.pipeline.routes.contract import PipelineRoute
from penstock.testing.enrolled import rebuilt
from penstock.testing.pipeline_schedule import check_complete, check_simulation, run_by_rounds
from penstock.testing.pipeline_training import check_trains
from penstock.testing.refusals import refused


def check(policy: PipelineRoute) -> None:
    """Asserts the law of ``pipeline.route``; it is trained along with four processes."""
    check_paths(policy)
    check_trains({policy.policy_name: policy}, 4)


def check_paths(policy: PipelineRoute) -> None:
    """What can be said without running: on its example, and for many numbers of devices and microbatches."""
    check_example(policy)
    for devices, microbatches in ((1, 1), (1, 3), (2, 1), (3, 5), (4, 8), (8, 16)):
        check_route(policy, devices, microbatches)
    draw = numpy_generator(0, "testing/pipeline.route")
    for _ in range(50):
        check_route(policy, int(draw.integers(1, 10)), int(draw.integers(1, 25)))
    check_recovery(policy)
    with refused(UsageError, "does nothing"):
        policy.build(0, 4)


def check_example(policy: PipelineRoute) -> None:
    """For one pair of numbers the paths are those that the policy gives."""
    example, stages, paths = policy.example()
    found = example.build(stages, len(paths)).paths
    assert found == paths, f"the paths are {found}, and {paths} in the example"


def check_recovery(policy: PipelineRoute) -> None:
    """A stage that can be made anew is so from those that take its place on other paths, or else from those before and
    behind it."""
    for stages in range(4, 10) if policy.recovers else ():
        paths = policy.build(stages, 2 * stages).paths
        for stage in range(stages):
            first = next(path for path in paths if stage in path)
            place = first.index(stage)
            instead = {path[place] for path in paths} - {stage}
            wanted = instead or {*first[max(place - 1, 0) : place], *first[place + 1 : place + 2]}
            found = policy.neighbours(stage, stages)
            assert sorted(found) == sorted(wanted), f"stage {stage} of {stages} is made anew from {found}, not {wanted}"


def check_route(policy: PipelineRoute, devices: int, microbatches: int) -> None:
    """Asserts the law for one pair of numbers. Where the policy refuses, for the pair that the refusal names."""
    try:
        schedule = policy.build(devices, microbatches)
    except RefusalError as refusal:
        assert (refusal.devices, refusal.microbatches) != (devices, microbatches)
        devices, microbatches = refusal.devices, refusal.microbatches
        schedule = policy.build(devices, microbatches)
    assert rebuilt(policy).build(devices, microbatches) == schedule, "the paths depend on more than the options"
    assert len(schedule.paths) == microbatches, f"there are {len(schedule.paths)} paths for {microbatches} microbatches"
    for path in schedule.paths:
        assert len(path) == len(set(path)) == policy.length(devices), f"a path passes {path} of {devices} stages"
        assert set(path) <= set(range(devices)), f"a path passes {path} of {devices} stages"
    served = Counter(stage for path in schedule.paths for stage in path)
    sometimes = [served[stage] for stage in range(devices) if served[stage] < microbatches]
    assert not sometimes or max(sometimes) - min(sometimes) <= 2, f"stages serve unevenly: {served}"
    check_complete(schedule)
    assert run_by_rounds(schedule) == [], "deadlock"
    validate(schedule)
    check_simulation(schedule)
