"""The runtime: what it refuses, what it measures, and what it says when a process is lost."""

from __future__ import annotations

import os
import re
import signal
from typing import Any

import pytest
import torch
from torch import nn

from penstock.core.errors import UsageError
from penstock.parallel.watch import LossError
from penstock.parallel.world import World
from penstock.pipeline.ir.schedule import Kind, Schedule, ScheduleError, Task, looped
from penstock.pipeline.run import transfers
from penstock.pipeline.run.grid import Grid
from penstock.pipeline.run.runtime import Runtime
from penstock.pipeline.run.transfers import Routes
from penstock.policy import create
from penstock.testing.pipeline_runtime import check_equal, dense, sparse
from penstock.testing.ranks import ranks

MICROBATCHES = 4


def scale_pipeline(world: World, schedule: Schedule, timeout: float = 60.0) -> tuple[Runtime, dict[str, nn.Parameter]]:
    """Stages that multiply by a number of their own."""
    grid = Grid(world, schedule.devices, timeout)
    names = [(f"scale{stage}",) for stage in range(schedule.stages)]
    held = {f"scale{stage}" for stage, devices in enumerate(schedule.placement) if grid.device in devices}
    parameters = {name: nn.Parameter(torch.tensor(2.0)) for name in sorted(held)}
    return Runtime(schedule, grid, parameters, names, dtype=torch.float32, device=torch.device("cpu")), parameters


def scaling(runtime: Runtime, parameters: dict[str, nn.Parameter], before: Any = lambda task: None) -> Any:
    """The forward function; ``before`` is called with each task."""

    def forward(stage: int, microbatch: int, x: torch.Tensor | None):
        before((stage, microbatch))
        out = (torch.full((3,), float(microbatch)) if x is None else x) * parameters[f"scale{stage}"]
        return (None, out.sum()) if stage == runtime.schedule.path(microbatch)[-1] else (out, None)

    return forward


def run_scales(schedule: Schedule) -> list[dict[str, Any]]:
    def work(world: World) -> dict[str, Any]:
        runtime, parameters = scale_pipeline(world, schedule)
        step = runtime.step(scaling(runtime, parameters), [(3,)] * schedule.microbatches)
        gradients = {name: p.grad.item() for name, p in parameters.items()}
        return {"loss": step.loss.item(), "gradients": gradients, "spans": step.spans, "peak": step.peak_activations}

    results = ranks(schedule.devices, work)
    assert [result.get("raised") for result in results] == [None] * schedule.devices
    return [result["returned"] for result in results]


def test_a_product_of_scales_in_closed_form():
    """d/ds of sum_m 3 m s^3 at s = 2, for each of three stages; times are in the order of the list."""
    results = run_scales(create("pipeline.schedule", "gpipe").build(3, MICROBATCHES))
    assert [result["loss"] for result in results] == [0.0, 0.0, 3 * 6 * 8]
    assert [result["gradients"] for result in results] == [{f"scale{rank}": 3 * 6 * 4} for rank in range(3)]
    assert [result["peak"] for result in results] == [MICROBATCHES] * 3
    for result in results:
        times = [time for span in result["spans"] for time in span]
        assert times == sorted(times)
        assert len(times) == 2 * 2 * MICROBATCHES


def test_replicas_end_with_the_same_sum():
    """Each copy sees half of the microbatches."""
    results = run_scales(create("pipeline.schedule", "chimera").build(2, MICROBATCHES))
    assert sum(result["loss"] for result in results) == 3 * 6 * 4
    assert [result["gradients"] for result in results] == [{"scale0": 36.0, "scale1": 36.0}] * 2


def test_messages_that_are_needed_in_another_order_than_they_are_made():
    """Each device works through its microbatches in an order of its own."""
    f, b, up, down = Kind.F, Kind.B, range(MICROBATCHES), range(MICROBATCHES - 1, -1, -1)
    orders = (
        tuple(Task(f, 0, i) for i in up) + tuple(Task(b, 0, i) for i in up),
        tuple(Task(f, 1, i) for i in down) + tuple(Task(b, 1, i) for i in down),
    )
    results = run_scales(Schedule(looped(2), orders, MICROBATCHES))
    assert [result["gradients"] for result in results] == [{f"scale{rank}": 3 * 6 * 2} for rank in range(2)]


@pytest.mark.parametrize("name", ["gpipe", pytest.param("interleaved_1f1b", marks=pytest.mark.slow), "v_half"])
def test_nothing_need_be_asked_for_ahead(monkeypatch, name):
    """As on CUDA: each message is asked for when it is needed, whatever comes before it on its way."""
    monkeypatch.setattr(transfers, "AHEAD", {"cpu": 0})
    schedule = create("pipeline.schedule", name).build(2, MICROBATCHES)
    stages = schedule.stages
    found = [result["gradients"] for result in run_scales(schedule)]
    assert found[0] | found[1] == {f"scale{stage}": 3 * 6 * 2 ** (stages - 1) for stage in range(stages)}


def test_microbatches_on_paths_of_their_own():
    """One passes the stages in order, one in the other order, one a single stage: d/ds of 3 (s s' + 2 s) at 2."""
    f, b = Kind.F, Kind.B
    orders = (
        (Task(f, 0, 0), Task(f, 0, 1), Task(b, 0, 1), Task(b, 0, 0), Task(f, 0, 2), Task(b, 0, 2)),
        (Task(f, 1, 1), Task(f, 1, 0), Task(b, 1, 0), Task(b, 1, 1)),
    )
    results = run_scales(Schedule(looped(2), orders, 3, paths=((0, 1), (1, 0), (0,))))
    assert [result["gradients"] for result in results] == [{"scale0": 3 * (2 + 2)}, {"scale1": 3 * 2}]


def test_several_pipelines_share_the_batch():
    """Two pipelines of two devices: the sums go over both, so each gradient is twice that of one."""
    schedule = create("pipeline.schedule", "zb_h1").build(2, 3)

    def work(world: World) -> list[Any]:
        runtime, parameters = scale_pipeline(world, schedule)
        runtime.step(scaling(runtime, parameters), [(3,)] * 3)
        return [runtime.grid.pipeline, runtime.grid.device, *(p.grad.item() for p in parameters.values())]

    results = ranks(4, work)
    assert [result["returned"] for result in results] == [[0, 0, 36], [0, 1, 36], [1, 0, 36], [1, 1, 36]]


@pytest.mark.parametrize("name", [pytest.param("1f1b", marks=pytest.mark.slow), "zb_h1"])
def test_a_stage_that_ignores_its_input_sends_back_a_gradient_of_zero(name):
    schedule = create("pipeline.schedule", name).build(2, 2)

    def work(world: World) -> float:
        runtime, parameters = scale_pipeline(world, schedule)
        forward = scaling(runtime, parameters)
        runtime.step(
            lambda stage, microbatch, x: forward(stage, microbatch, None if x is None else torch.ones(3)),
            [(3,)] * 2,
        )
        return next(iter(parameters.values())).grad.item()

    assert [result["returned"] for result in ranks(2, work)] == [0, 6]


def test_one_device_needs_no_other():
    for config in (dense(3), sparse(3)):
        schedule = create("pipeline.schedule", "zb_h1").build(1, 2)
        check_equal(schedule, Grid(World(), 1), config)


def test_every_need_is_met_by_a_task_before_it_in_some_order():
    schedule = create("pipeline.schedule", "v_half").build(4, 6)
    routes = Routes(schedule)
    assert routes.targets.keys() == routes.sources.keys()
    assert all(need in routes.read[need.reader] and need in routes.made[need.maker] for need in routes.targets)
    assert len(routes.targets) == 2 * (schedule.stages - 1) * 6
    assert sum(map(len, routes.queues.values())) == len(routes.targets) - 2 * 6  # the turn of the V stays on a device


def test_schedules_that_cannot_run_are_refused_before_anything_is_sent():
    orders = ((Task(Kind.F, 0, 0),), (Task(Kind.F, 1, 0), Task(Kind.B, 1, 0)))
    with pytest.raises(ScheduleError, match="0B0 is missing"):
        scale_pipeline(World(), Schedule(looped(2)[:1], (orders[0],), 1))


def test_processes_that_make_no_whole_pipelines():
    with pytest.raises(UsageError, match="6 processes do not make whole pipelines of 4"):
        Grid(World(0, 6), 4)


@pytest.mark.parametrize(("lost", "how"), [(0, signal.SIGKILL), (2, signal.SIGKILL), (2, signal.SIGSTOP)])
def test_a_lost_process_is_named_by_all_others(lost, how):
    """Killed or hanging in a task: each of the others ends and names it, and the task that it hangs in.

    One that is killed is noticed at once: nobody here waits for the hour after which it would count as lost.
    """
    schedule = create("pipeline.schedule", "1f1b").build(3, MICROBATCHES)
    ended, ends = os.pipe()

    def work(world: World) -> None:
        runtime, parameters = scale_pipeline(world, schedule, timeout=2.0 if how == signal.SIGSTOP else 3600.0)

        def before(task: tuple[int, int]) -> None:
            if task == (lost, 2):
                if how == signal.SIGSTOP and os.fork() == 0:  # the stopped one ends once the other two have
                    for _ in range(2):
                        os.read(ended, 1)
                    os.kill(stopped, signal.SIGKILL)
                    os._exit(0)
                os.kill(stopped, how)

        stopped = os.getpid()
        try:
            runtime.step(scaling(runtime, parameters, before), [(3,)] * MICROBATCHES)
        finally:
            os.write(ends, b".")

    results = ranks(3, work)
    assert results[lost] == {}
    for rank in {0, 1, 2} - {lost}:
        kind, message = results[rank]["raised"]
        assert kind == LossError.__name__
        wanted = (
            "does not answer: its {}[FB]\\d+ was waited for" if how == signal.SIGSTOP else "has ended without a word"
        )
        assert re.match(f"rank {lost} {wanted.format(lost)}\n", message), message
