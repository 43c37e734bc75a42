"""The search behind zb_auto, against exact optima found by OR-Tools' CP-SAT and against the simulator."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ortools.sat.python import cp_model

from effort import lines
from penstock.core.errors import UsageError
from penstock.pipeline.ordering.zero_bubble import Problem
from penstock.pipeline.simulate.simulator import simulate
from penstock.pipeline.simulate.times import Times
from penstock.policy import create


def optimum(problem: Problem) -> float:
    """The least makespan of whole-numbered times, by constraint programming; ``deferred`` in hundredths."""
    model = cp_model.CpModel()
    p, m = problem.devices, problem.microbatches
    transfer, kept = round(problem.transfer), round(100 * problem.deferred)
    durations = [[round(seconds) for seconds in times] for times in problem.durations]
    horizon = m * sum(map(sum, durations)) + 2 * p * transfer
    starts = {
        (kind, s, j): model.new_int_var(0, horizon, f"{kind}{s},{j}")
        for kind in range(3)
        for s in range(p)
        for j in range(m)
    }
    ends = {(kind, s, j): start + durations[kind][s] for (kind, s, j), start in starts.items()}
    makespan = model.new_int_var(0, horizon, "makespan")
    for s in range(p):
        tasks = [(kind, s, j) for kind in range(3) for j in range(m)]
        model.add_no_overlap([model.new_fixed_size_interval_var(starts[t], durations[t[0]][s], "") for t in tasks])
        lives = []
        for j in range(m):
            for kind in range(3):
                if j:
                    model.add(starts[kind, s, j] >= ends[kind, s, j - 1])  # microbatches are alike
                if kind:
                    model.add(starts[kind, s, j] >= ends[kind - 1, s, j])
            if s:
                model.add(starts[0, s, j] >= ends[0, s - 1, j] + transfer)
            if s < p - 1:
                model.add(starts[1, s, j] >= ends[1, s + 1, j] + transfer)
            for last, size in ((1, 100 - kept), (2, kept)):
                length = model.new_int_var(0, horizon, "")
                lives.append((model.new_interval_var(starts[0, s, j], length, ends[last, s, j], ""), size))
        model.add_cumulative([life for life, _ in lives], [size for _, size in lives], round(100 * problem.memory))
        model.add(makespan >= ends[2, s, m - 1])
    model.minimize(makespan)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.max_time_in_seconds = 120
    assert solver.solve(model) == cp_model.OPTIMAL
    return solver.objective_value


def random_problem(rng: random.Random, p: int, m: int) -> Problem:
    """Whole-numbered times, equal or different for each stage, with a memory limit."""
    uneven = rng.random() < 0.5
    times = [tuple(rng.randint(4, 20) for _ in range(p)) for _ in range(3)]
    return Problem(
        *(own if uneven else (own[0],) * p for own in times),
        transfer=rng.choice([0, 1, 2, 5]),
        memory=rng.randint(1 if rng.random() < 0.5 else p, 2 * p),
        deferred=rng.choice([1.0, 1.0, 0.5, 0.25]),
        microbatches=m,
    )


def solve(problem: Problem) -> float:
    """The makespan of zb_auto, as simulated, after a check of its memory."""
    times = Times(
        forward=problem.forward,
        input_grad=problem.input_grad,
        weight_grad=problem.weight_grad,
        transfer=problem.transfer,
        deferred=problem.deferred,
    )
    policy = create("pipeline.schedule", "zb_auto", times=times.model_dump(), memory=problem.memory)
    schedule = policy.build(problem.devices, problem.microbatches)
    simulation = simulate(schedule, times.costs(schedule))
    assert max(simulation.peak_bytes) <= problem.memory + 1e-9
    return simulation.makespan


def excesses(shapes: list[tuple[int, int]], seed: int) -> list[float]:
    """How much longer than the optimum, for one random problem of each shape."""
    rng = random.Random(seed)
    problems = [random_problem(rng, p, m) for p, m in shapes]
    return [solve(problem) / optimum(problem) - 1 for problem in problems]


SMALL = [(p, m) for p in range(1, 5) for m in range(1, 7)]


def test_close_to_the_optimum():
    found = excesses(SMALL, seed=1)
    assert min(found) >= -1e-9
    assert sum(found) / len(found) <= 0.005
    assert max(found) <= 0.05


@pytest.mark.slow
def test_close_to_the_optimum_of_many_problems():
    """Prints what the docstring of zb_auto says."""
    found = [excess for seed in range(50) for excess in excesses(SMALL, seed)]
    print(
        f"\n{len(found)} problems: {sum(found) / len(found):.3%} over the optimum on average, {max(found):.2%} at most"
    )
    assert min(found) >= -1e-9
    assert sum(found) / len(found) <= 0.0005
    assert max(found) <= 0.05


@pytest.mark.parametrize(("p", "m"), [(1, 1), (2, 3), (4, 8), (5, 5), (8, 24), (32, 128)])
@pytest.mark.parametrize("name", ["zb_h1", "1f1b"])
def test_no_longer_than_the_handmade_schedules_within_their_memory(name, p, m):
    by_hand = create("pipeline.schedule", name).build(p, m)
    for times in (Times(), Times(forward=1.0, input_grad=1.5, weight_grad=0.5, transfer=0.25)):
        found = create("pipeline.schedule", "zb_auto", times=times.model_dump()).build(p, m)
        assert simulate(found, times.costs(found)).makespan <= simulate(by_hand, times.costs(by_hand)).makespan + 1e-9


@given(p=st.integers(1, 5), m=st.integers(1, 7), seed=st.integers(0, 2**32))
def test_memory_is_kept_and_the_bound_is_one(p, m, seed):
    problem = random_problem(random.Random(seed), p, m)
    assert solve(problem) >= problem.bound - 1e-9


def test_more_memory_takes_no_more_time():
    makespans = [solve(Problem((3, 2, 4, 3), (4,) * 4, (2, 3, 2, 4), 1, memory, 1, 8)) for memory in range(1, 9)]
    assert makespans == sorted(makespans, reverse=True)
    assert makespans[0] > 1.5 * makespans[-1]


def test_work_grows_with_the_tasks():
    """Twice the devices, or the microbatches, are little more than twice the work; the result stays good."""
    rng = random.Random(0)
    times = [tuple(rng.uniform(0.8, 1.2) for _ in range(16)) for _ in range(3)]

    def problem(devices: int, microbatches: int) -> Problem:
        own = [each[:devices] for each in times]
        return Problem(*own, transfer=0.1, memory=devices, deferred=1, microbatches=microbatches)

    solve(problem(2, 2))  # imports
    few = lines(lambda: solve(problem(4, 64)))
    assert lines(lambda: solve(problem(8, 64))) < 3 * few
    assert lines(lambda: solve(problem(4, 128))) < 3 * few
    assert solve(problem(16, 128)) < 1.03 * problem(16, 128).bound


def test_times_of_other_stages_are_refused():
    with pytest.raises(UsageError, match="forward are for 3 stages, and this pipeline has 4"):
        create("pipeline.schedule", "zb_auto", times={"forward": [1, 2, 3]}).build(4, 4)
