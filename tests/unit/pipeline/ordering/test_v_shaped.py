"""V-shaped schedules against the orders of their authors' program, and v_auto against exact optima."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path

import pytest

from optimal_orders import optimum, random_problem
from penstock.pipeline.ir.schedule import zigzag
from penstock.pipeline.ir.torch_csv import from_csv
from penstock.pipeline.ordering.words import Problem, Run, to_words
from penstock.pipeline.simulate.simulator import Simulation, simulate
from penstock.pipeline.simulate.times import Times
from penstock.policy import create

ORDERS = Path(__file__).parents[1] / "orders"

#: Of the makespans that the authors' program takes, by times, schedule and p, for m = p, p + 1, ... 4p.
THEIRS = json.loads((ORDERS / "authors_v_makespans.json").read_text())
TIMES = {
    "F=1,I=1,W=1,comm=0": Times(),
    "F=1,I=1.2,W=0.8,comm=0": Times(forward=1, input_grad=1.2, weight_grad=0.8),
    "F=1,I=1,W=0.7,comm=0.04": Times(weight_grad=0.7, transfer=0.04),
}


def run(name: str, p: int, m: int, times: Times, /, **options: object) -> Simulation:
    schedule = create("pipeline.schedule", name, **options).build(p, m)
    return simulate(schedule, times.costs(schedule))


@functools.cache
def by_hand(name: str, p: int, m: int, label: str) -> Simulation:
    return run(name, p, m, TIMES[label])


def auto(p: int, m: int, times: Times, memory: float) -> Simulation:
    found = run("v_auto", p, m, times, times=times.model_dump(), memory=memory)
    assert max(found.peak_bytes) <= memory + 1e-9
    return found


@pytest.mark.parametrize(("file", "name", "p", "m"), [("vhalf_4_8", "v_half", 4, 8), ("vmin_3_6", "v_min", 3, 6)])
def test_the_handed_orders_are_met(file, name, p, m):
    theirs = from_csv((ORDERS / f"authors_{file}.csv").read_text(), file)
    reference, ours = simulate(theirs, Times().costs(theirs)), by_hand(name, p, m, "F=1,I=1,W=1,comm=0")
    assert max(ours.peak_activations) <= max(reference.peak_activations)
    assert ours.makespan <= reference.makespan == {4: 26.5, 3: 20.5}[p]


@pytest.mark.parametrize("p", [2, 3, 4, 5, *(pytest.param(p, marks=pytest.mark.slow) for p in (6, 7, 8))])
@pytest.mark.parametrize("name", ["v_half", "v_min"])
def test_every_cell_of_the_authors_program_is_met(name, p):
    for label, times in TIMES.items():
        for m, makespan in enumerate(THEIRS[label][name][str(p)], p):
            ours = by_hand(name, p, m, label).schedule
            assert simulate(ours, times.costs(ours)).makespan <= makespan + 1e-6, (label, m)


def check_cell(p: int, m: int, label: str) -> None:
    """At the memory of each named schedule, v_auto is as fast as all named ones that fit, and as the authors'."""
    named = [by_hand(name, p, m, label) for name in ("v_min", "v_half", "v_zb")]
    for limit in {max(simulation.peak_bytes) for simulation in named}:
        found = auto(p, m, TIMES[label], limit).makespan
        fitting = [simulation.makespan for simulation in named if max(simulation.peak_bytes) <= limit]
        fitting += [
            THEIRS[label][name][str(p)][m - p]
            for name, simulation in zip(("v_min", "v_half"), named, strict=False)
            if max(simulation.peak_bytes) <= limit
        ]
        assert found <= min(fitting) + 1e-6, (p, m, label, limit)


@pytest.mark.parametrize(("p", "m"), [(2, 2), (3, 7), (5, 10), pytest.param(8, 9, marks=pytest.mark.slow)])
@pytest.mark.parametrize("label", TIMES)
def test_v_auto_is_behind_no_named_block(p, m, label):
    check_cell(p, m, label)


@pytest.mark.slow
@pytest.mark.parametrize("label", TIMES)
@pytest.mark.parametrize("p", range(2, 9))
def test_v_auto_is_behind_no_named_block_in_any_cell(p, label):
    for m in range(p, 4 * p + 1):
        check_cell(p, m, label)


def test_blocks_are_chosen_by_times():
    """V-Min drifts where times differ, and V-Half needs no more memory on 5 devices."""
    times = TIMES["F=1,I=1.2,W=0.8,comm=0"]
    assert auto(5, 20, times, 3).makespan < 0.85 * run("v_min", 5, 20, times).makespan


@pytest.mark.parametrize("seed", range(6))
def test_v_auto_is_close_to_the_optimum(seed):
    rng = random.Random(seed)
    p, m = rng.choice([(1, 3), (2, 2), (2, 4), (3, 2), (3, 3)])
    problem = random_problem(rng, zigzag(p, 2), rng.randint(2, 2 * p + 1), m)
    times = Times(
        forward=problem.forward,
        input_grad=problem.input_grad,
        weight_grad=problem.weight_grad,
        transfer=problem.transfer,
        deferred=problem.deferred,
    )
    found, best = auto(p, m, times, problem.memory / 2).makespan, optimum(problem)
    assert best - 1e-6 <= found <= 1.05 * best


def test_less_memory_than_v_min_needs_takes_longer():
    makespans = [auto(6, 10, Times(), memory).makespan for memory in (1, 2, 3, 6)]
    assert makespans == sorted(makespans, reverse=True)
    assert makespans[0] <= 10 * 6 * 6 / 2  # one microbatch at a time, each task after the other


def test_words_are_timed_as_by_the_simulator():
    rng = random.Random(0)
    for name, placement in (("v_half", zigzag(4, 2)), ("v_zb", zigzag(4, 2))):
        problem = random_problem(rng, placement, 99, 9)
        schedule = create("pipeline.schedule", name).build(4, 9)
        times = Times(
            forward=problem.forward,
            input_grad=problem.input_grad,
            weight_grad=problem.weight_grad,
            transfer=problem.transfer,
        )
        assert Run(problem, to_words(problem, schedule)).cost[0] == simulate(schedule, times.costs(schedule)).makespan


def test_a_deadlock_of_words_is_found():
    problem = Problem(zigzag(2, 2), (1,) * 4, (1,) * 4, (1,) * 4, 0, 9, 1, 1)
    words = to_words(problem, create("pipeline.schedule", "v_min").build(2, 1))
    assert Run(problem, [words[0], [1, 0, *words[1][2:]]]).cost == (float("inf"),) * 3
