"""The best trees of drafted tokens and probes, for what guesses are accepted and what rows cost.

A step verifies a tree of drafted tokens, behind each of which stand some *probes*: rows that guess the tokens behind
it. After the step the probes of the last accepted token, k of them, say which tokens are drafted next, so that the next
tree is at most k tokens tall. So k is the state of a Markov chain, a tree for each state is a policy, and what is
wanted is the policy with the most tokens a unit of time in the long run: the sum over the states of their stationary
probability times the expected tokens, divided by the same sum of what a step costs (from knowledge of paper 333: tokens
amortized over the states, divided by the latency of a step of the tree's size).

Ours: the trees are exact, by policy iteration, and not grown greedily: for given worths h of the states, the best
tree of each size follows by dynamic programming from its leaves on, since what stands behind a token is worth as much
as it would be anywhere at this depth, times the probability that the token is reached; and h follows from the trees by
linear equations.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import NamedTuple

import numpy as np

from penstock.speculate.contract import AWAITED
from penstock.speculate.tree import Tree, depths

#: The probability that a text ends with a step and another begins, of which nothing is guessed: so that the chain has
#: one stationary distribution, whatever the trees are.
ENDS = 1e-6

#: Rounds after which policy iteration ends in any case; it takes three or four.
ROUNDS = 30


class Plan(NamedTuple):
    """A tree for each state.

    Attributes:
        trees: of the states 0, 1, ...
        rate: tokens a unit of cost in the long run.
        shares: float64 [states], how often each state is.
    """

    trees: tuple[Tree, ...]
    rate: float
    shares: np.ndarray


def best_plan(acceptance: np.ndarray, costs: np.ndarray) -> Plan:
    """The plan with the highest rate.

    Args:
        acceptance: float64 [K, R], how likely the guess of each rank at each depth is accepted if the one before it
            was, the first the deepest least; ranks of a depth exclude each other. No more than K probes stand behind a
            token.
        costs: float64 [N + 1], of a step with so many rows beside the newest token.
    """
    states = 1 + len(acceptance)
    worths, best, before = np.zeros(states), Plan((), 0.0, np.zeros(states)), Plan((), 0.0, np.zeros(states))
    for _ in range(ROUNDS):
        trees = tuple(_best_tree(acceptance, costs, worths, before.rate, state) for state in range(states))
        if trees == before.trees:
            break
        before, worths = evaluated(trees, acceptance, costs)
        # A better tree for a state that is hardly reached yet leaves the rate as it is.
        best = max(best, before, key=lambda plan: plan.rate)
    return best


def evaluated(trees: tuple[Tree, ...], acceptance: np.ndarray, costs: np.ndarray) -> tuple[Plan, np.ndarray]:
    """The plan of these ``trees``, and what each state is worth beside the state 0, in tokens."""
    states = len(trees)
    tokens, moves = np.zeros(states), np.zeros((states, states))
    for state, tree in enumerate(trees):
        tokens[state], moves[state] = outcome(tree, acceptance, states)
    moves *= 1 - ENDS
    moves[:, 0] += ENDS
    spent = np.array([costs[tree.rows] for tree in trees])
    equations = np.vstack([moves.T - np.eye(states), np.ones(states)])
    shares = np.linalg.lstsq(equations, np.append(np.zeros(states), 1.0), rcond=None)[0]
    rate = float(shares @ tokens / (shares @ spent))
    worths = np.zeros(states)
    if states > 1:
        worths[1:] = np.linalg.solve(np.eye(states - 1) - moves[1:, 1:], (tokens - rate * spent)[1:])
    return Plan(trees, rate, shares), worths


def outcome(tree: Tree, acceptance: np.ndarray, states: int) -> tuple[float, np.ndarray]:
    """The tokens that a step with ``tree`` brings in the mean, that behind the accepted ones among them, and how likely
    each of so many ``states`` is after it, [states]."""
    ranks = ranks_of(tree.parents)
    reached, tall = [1.0], [0, *depths(tree.parents)]
    for node, parent in enumerate(tree.parents):
        reached.append(reached[parent + 1] * acceptance[tall[node + 1] - 1, ranks[node]])
    last = np.array(reached)
    for node, parent in enumerate(tree.parents):
        last[parent + 1] -= reached[node + 1]
    moves = np.zeros(states)
    np.add.at(moves, np.array(tree.probes or [0] * len(reached)), last)
    return sum(reached), moves


def ranks_of(parents: List[int]) -> list[int]:
    """Of each node of a tree, how many of those behind the same token stand before it."""
    seen: dict[int, int] = {}
    ranks = []
    for parent in parents:
        ranks.append(seen.get(parent, 0))
        seen[parent] = ranks[-1] + 1
    return ranks


class _Choices(NamedTuple):
    """What is best at a depth, for each number of rows behind a token, by what it is worth beside being there.

    Attributes:
        worth: float64 [N + 1].
        probes, children: int64 [N + 1], how many of each.
        shares: int64 [probes, R, N + 1]: where so many rows are for the first r + 1 children, those behind the last.
    """

    worth: np.ndarray
    probes: np.ndarray
    children: np.ndarray
    shares: np.ndarray


def _best_tree(acceptance: np.ndarray, costs: np.ndarray, worths: np.ndarray, rate: float, state: int) -> Tree:
    """The tree for ``state`` that brings the most tokens, ``worths`` of the state after it included, less ``rate`` for
    a unit of what it costs."""
    most = len(costs) - 1
    levels: list[_Choices] = []
    for depth in range(state, -1, -1):  # from the leaves on
        levels.insert(0, _choices(acceptance, worths, depth, levels[0].worth if levels else None, most))
    rows = int((levels[0].worth - rate * costs).argmax())
    return _built(levels, rows)


def _choices(acceptance: np.ndarray, worths: np.ndarray, depth: int, behind: np.ndarray | None, most: int) -> _Choices:
    """What is best for a token at ``depth``, where a child with b rows ``behind`` it brings 1 + behind[b]."""
    ranks, probes = acceptance.shape[1], min(len(worths) - 1, most) + 1
    left = np.arange(most + 1)[:, None] - 1 - np.arange(most + 1)  # [rows of all, behind the last]: of the others
    found = np.full((probes, ranks + 1, most + 1), -np.inf)
    found[:, 0] = worths[:probes, None]
    shares = np.zeros((probes, ranks, most + 1), np.int64)
    if behind is not None:
        for rank in range(ranks):
            # A child takes its part of what is gained where its parent is the last one.
            gained = acceptance[depth, rank] * (1 + behind - worths[:probes, None])
            every = np.where(left >= 0, found[:, rank, left.clip(0)] + gained[:, None, :], -np.inf)
            shares[:, rank] = every.argmax(-1)
            found[:, rank + 1] = every.max(-1)
    # Probes are rows too.
    shifted = np.full_like(found, -np.inf)
    for count in range(probes):
        shifted[count, :, count:] = found[count, :, : most + 1 - count]
    flat = shifted.reshape(-1, most + 1)
    counts, children = np.divmod(flat.argmax(0), ranks + 1)
    return _Choices(flat.max(0), counts, children, shares)


def _built(levels: List[_Choices], rows: int) -> Tree:
    """The tree of so many ``rows`` that was found best, one generation behind the other."""
    parents: list[int] = []
    probes: list[int] = []
    generation = [rows]
    for level in levels:
        node, following = len(probes) - 1, []
        for size in generation:
            own, children = int(level.probes[size]), int(level.children[size])
            probes.append(own)
            left, sizes = size - own, list[int]()
            for rank in range(children - 1, -1, -1):
                sizes.insert(0, int(level.shares[own, rank, left]))
                left -= 1 + sizes[0]
            following += sizes
            parents += [node] * children
            node += 1
        generation = following
    return Tree([AWAITED] * len(parents), parents, probes)
