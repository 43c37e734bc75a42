"""The best verifiers of small vocabularies, found by OR-Tools' linear programming."""

from __future__ import annotations

from collections.abc import Sequence

from ortools.linear_solver import pywraplp

#: By default a solution may be off by more than what it is compared with.
TIGHT = "primal_feasibility_tolerance: 1e-13 dual_feasibility_tolerance: 1e-13 preprocessor_zero_tolerance: 1e-15"


def most_accepted(target: Sequence[float], drafts: Sequence[Sequence[int]], weights: Sequence[float]) -> float:
    """The greatest probability that the token that comes out is a drafted one, over all couplings of the drafts, which
    come with the ``weights``, with a token of the target's distribution."""
    solver = pywraplp.Solver.CreateSolver("GLOP")
    comes = [solver.Constraint(0.0, share) for share in target]
    flows = []
    for drafted, weight in zip(drafts, weights, strict=True):
        given = solver.Constraint(0.0, weight)
        for token in sorted(set(drafted)):
            flow = solver.NumVar(0.0, solver.infinity(), "")
            given.SetCoefficient(flow, 1.0)
            comes[token].SetCoefficient(flow, 1.0)
            flows.append(flow)
    solver.SetSolverSpecificParametersAsString(TIGHT)
    solver.Maximize(sum(flows))
    assert solver.Solve() == pywraplp.Solver.OPTIMAL
    return float(solver.Objective().Value())
