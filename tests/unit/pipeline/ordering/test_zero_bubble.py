"""The search behind zb_auto, against exact optima, the authors' greedy scheduler and the simulator."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effort import lines
from optimal_orders import optimum, random_problem
from penstock.core.errors import UsageError
from penstock.pipeline.ir.schedule import looped
from penstock.pipeline.ir.torch_csv import from_csv
from penstock.pipeline.ordering import zero_bubble
from penstock.pipeline.ordering.words import Problem, Run, to_words
from penstock.pipeline.simulate.simulator import simulate
from penstock.pipeline.simulate.times import Times
from penstock.policy import create


def problem_of_random_times(rng: random.Random, p: int, m: int) -> Problem:
    """With a memory limit."""
    memory = rng.randint(1 if rng.random() < 0.5 else p, 2 * p)
    return random_problem(rng, looped(p), memory, m)


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
    problems = [problem_of_random_times(rng, p, m) for p, m in shapes]
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


ORDERS = Path(__file__).parents[1] / "orders"

#: Random cases for which the authors' program gave an order: p, m, F, I, W, transfer, memory, and its makespan.
AUTHORS = {
    "authors_zb_3_6": (3, 6, 1, 2, 3, 1, 3, 44),
    "authors_zb_8_9": (8, 9, 676, 789, 1269, 500, 8, 39_978),
}


@pytest.mark.parametrize("name", AUTHORS)
def test_the_variants_hold_the_authors_orders_and_the_search_is_no_worse(name):
    p, m, f, i, w, transfer, memory, makespan = AUTHORS[name]
    problem = Problem(looped(p), (f,) * p, (i,) * p, (w,) * p, transfer, memory, 1.0, m)
    theirs = to_words(problem, from_csv((ORDERS / f"{name}.csv").read_text(), name))
    assert Run(problem, theirs).cost[0] == makespan
    assert theirs in list(zero_bubble.variants(problem))
    assert solve(problem) <= makespan


@pytest.mark.parametrize("seed", range(8))
def test_no_longer_than_any_variant_of_the_authors(seed):
    rng = random.Random(seed)
    problem = problem_of_random_times(rng, rng.randint(2, 9), rng.randint(2, 24))
    runs = [Run(problem, words) for words in zero_bubble.variants(problem)]
    assert solve(problem) <= min((run.cost[0] for run in runs), default=math.inf)


@pytest.mark.parametrize(
    ("p", "m"), [(1, 1), (2, 3), (4, 8), (5, 5), (8, 24), pytest.param(32, 128, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", ["zb_h1", "1f1b"])
def test_no_longer_than_the_handmade_schedules_within_their_memory(name, p, m):
    by_hand = create("pipeline.schedule", name).build(p, m)
    for times in (Times(), Times(forward=1.0, input_grad=1.5, weight_grad=0.5, transfer=0.25)):
        found = create("pipeline.schedule", "zb_auto", times=times.model_dump()).build(p, m)
        assert simulate(found, times.costs(found)).makespan <= simulate(by_hand, times.costs(by_hand)).makespan + 1e-9


@given(p=st.integers(1, 5), m=st.integers(1, 7), seed=st.integers(0, 2**32))
def test_memory_is_kept_and_the_bound_is_one(p, m, seed):
    problem = problem_of_random_times(random.Random(seed), p, m)
    assert solve(problem) >= problem.bound - 1e-9


def test_more_memory_takes_no_more_time():
    makespans = [
        solve(Problem(looped(4), (3, 2, 4, 3), (4,) * 4, (2, 3, 2, 4), 1, memory, 1, 8)) for memory in range(1, 9)
    ]
    assert makespans == sorted(makespans, reverse=True)
    assert makespans[0] > 1.5 * makespans[-1]


@pytest.mark.slow
def test_work_grows_with_the_tasks():
    """Twice the devices, or the microbatches, are little more than twice the work; the result stays good."""
    rng = random.Random(0)
    times = [tuple(rng.uniform(0.8, 1.2) for _ in range(16)) for _ in range(3)]

    def problem(devices: int, microbatches: int) -> Problem:
        own = [each[:devices] for each in times]
        return Problem(looped(devices), *own, transfer=0.1, memory=devices, deferred=1, microbatches=microbatches)

    solve(problem(2, 2))  # imports
    few = lines(lambda: solve(problem(4, 24)))
    assert lines(lambda: solve(problem(8, 24))) < 3 * few
    assert lines(lambda: solve(problem(4, 48))) < 3 * few
    assert solve(problem(8, 64)) < 1.05 * problem(8, 64).bound


def test_times_of_other_stages_are_refused():
    with pytest.raises(UsageError, match="forward are for 3 stages, and this pipeline has 4"):
        create("pipeline.schedule", "zb_auto", times={"forward": [1, 2, 3]}).build(4, 4)
