"""The law of ``pipeline.schedule`` at run time, for every registered policy, with several processes over gloo."""

from __future__ import annotations

import pytest

import forked_ranks
from penstock.parallel.world import World
from penstock.pipeline.run.grid import Grid
from penstock.pipeline.simulate.times import Times
from penstock.pipeline.transforms.vocabulary import shard
from penstock.policy import create
from penstock.testing.enrolled import enrolled
from penstock.testing.pipeline_runtime import check_runtime, check_schedule_runs
from penstock.testing.pipeline_schedule import variants

POLICIES = enrolled("pipeline.schedule")
TRANSFORMS = enrolled("pipeline.transform")


def verdicts(policies, microbatches: int):
    """Checks all policies in one process group; the failures by name, with their place."""

    def work(world: World) -> dict[str, object]:
        grid = Grid(world, world.size)
        found: dict[str, object] = {}
        for name, policy in policies.items():
            try:
                found[name] = check_runtime(policy, grid, microbatches)
            except AssertionError as error:
                found[name] = str(error)
        return found

    return work


def assert_equal_to_one_device(policies, size: int, microbatches: int) -> None:
    results = forked_ranks.ranks(size, verdicts(policies, microbatches))
    assert [result.get("raised") for result in results] == [None] * size
    verdicts_by_rank = [result["returned"].items() for result in results]
    faults = [
        f"{name}: {found}" for verdict in verdicts_by_rank for name, found in verdict if found not in (True, False)
    ]
    assert not faults, "\n".join(faults)
    skipped = {name for name, verdict in results[0]["returned"].items() if verdict is False}
    assert size % 2 == 1 or not skipped


@pytest.mark.parametrize("size", [2, 3, 4])
def test_several_processes_compute_what_one_does(size):
    """Those that refuse an odd number of devices are checked with an even one."""
    assert_equal_to_one_device(POLICIES, size, 5)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transformed_schedule_computes_the_same(name):
    """Every transform of a schedule with several stages on a device, and of one with I and W."""

    def work(world: World) -> None:
        for schedule in ("interleaved_1f1b", "zb_h1"):
            for variant in variants(TRANSFORMS[name]):
                transformed = variant.apply(POLICIES[schedule].build(world.size, 6))
                check_schedule_runs(transformed, Grid(world, world.size))

    assert [result.get("raised") for result in forked_ranks.ranks(3, work)] == [None] * 3


@pytest.mark.parametrize("barriers", [1, 2, 3])
def test_a_sharded_vocabulary_computes_the_same(barriers):
    """Also where a stage has replicas, one device turns the pipeline round, and activations wait on the host."""
    offload = create("pipeline.transform", "pipeoffload", times={"host": 0.01})

    def work(world: World) -> None:
        for schedule in ("chimera", "v_half"):
            sharded = shard(POLICIES[schedule].build(world.size, 6), barriers, Times(), 1.0)
            check_schedule_runs(sharded, Grid(world, world.size))
        both = offload.apply(shard(POLICIES["1f1b"].build(world.size, 6), barriers, Times(), 1.0))
        assert both.offloaded
        check_schedule_runs(both, Grid(world, world.size))

    assert [result.get("raised") for result in forked_ranks.ranks(2, work)] == [None] * 2


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("microbatches", [1, 12])
def test_options_and_numbers(size, microbatches):
    policies = {f"{name}, variant {i}": v for name, p in POLICIES.items() for i, v in enumerate(variants(p))}
    assert_equal_to_one_device(policies, size, microbatches)
