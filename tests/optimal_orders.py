"""The best orders of small pipelines, found by OR-Tools' CP-SAT, and random problems to find them for."""

from __future__ import annotations

import random

from penstock.pipeline.ir.schedule import Placement
from penstock.pipeline.ordering.words import Problem


def optimum(problem: Problem) -> float:
    """The least makespan of whole-numbered times, by constraint programming; ``deferred`` in hundredths."""
    from ortools.sat.python import cp_model  # takes more than a second

    model = cp_model.CpModel()
    m, stages = problem.microbatches, range(len(problem.placement))
    transfer, kept = round(problem.transfer), round(100 * problem.deferred)
    times = (problem.forward, problem.input_grad, problem.weight_grad)
    durations = [[round(seconds) for seconds in each] for each in times]
    horizon = m * (sum(map(sum, durations)) + 2 * len(stages) * transfer)
    starts = {
        (kind, s, j): model.new_int_var(0, horizon, f"{kind}{s},{j}")
        for kind in range(3)
        for s in stages
        for j in range(m)
    }
    ends = {(kind, s, j): start + durations[kind][s] for (kind, s, j), start in starts.items()}
    makespan = model.new_int_var(0, horizon, "makespan")
    for s in stages:
        for j in range(m):
            for kind in range(3):
                if j:
                    model.add(starts[kind, s, j] >= ends[kind, s, j - 1])  # microbatches are alike
                if kind:
                    model.add(starts[kind, s, j] >= ends[kind - 1, s, j])
            if s:
                delay = 0 if problem.placement[s] == problem.placement[s - 1] else transfer
                model.add(starts[0, s, j] >= ends[0, s - 1, j] + delay)
                model.add(starts[1, s - 1, j] >= ends[1, s, j] + delay)
        model.add(makespan >= ends[2, s, m - 1])
    for device in {home for (home,) in problem.placement}:
        own = [s for s in stages if problem.placement[s] == (device,)]
        tasks = [(kind, s, j) for kind in range(3) for s in own for j in range(m)]
        model.add_no_overlap([model.new_fixed_size_interval_var(starts[t], durations[t[0]][t[1]], "") for t in tasks])
        lives = []
        for _, s, j in (task for task in tasks if task[0] == 0):
            for last, size in ((1, 100 - kept), (2, kept)):
                length = model.new_int_var(0, horizon, "")
                lives.append((model.new_interval_var(starts[0, s, j], length, ends[last, s, j], ""), size))
        model.add_cumulative([life for life, _ in lives], [size for _, size in lives], round(100 * problem.memory))
    model.minimize(makespan)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.max_time_in_seconds = 120
    assert solver.solve(model) == cp_model.OPTIMAL
    return solver.objective_value


def random_problem(rng: random.Random, placement: Placement, memory: float, m: int) -> Problem:
    """Whole-numbered times, equal or different for each stage."""
    uneven, stages = rng.random() < 0.5, len(placement)
    times = [tuple(rng.randint(4, 20) for _ in range(stages)) for _ in range(3)]
    forward, input_grad, weight_grad = (own if uneven else (own[0],) * stages for own in times)
    transfer, deferred = rng.choice([0, 1, 2, 5]), rng.choice([1.0, 1.0, 0.5, 0.25])
    return Problem(placement, forward, input_grad, weight_grad, transfer, memory, deferred, m)
