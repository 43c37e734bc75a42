"""The best choice among drafts where few tokens are left, by a linear program."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import Field
from scipy.optimize import linprog
from scipy.sparse import coo_array
from torch import Tensor

from penstock.policy import policy
from penstock.speculate.verifiers.contract import Example
from penstock.speculate.verifiers.importance import Importance
from penstock.speculate.verifiers.residual import accepted, leftover, mixed

#: Ways to draw the drafts of a place, up to which its program is set up: beyond, it would take longer than a step.
MOST = 5_000

#: How far a solution may be off. Drafts that are less likely than that need not be chosen from as is best.
TOLERANCES = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}


@policy("speculate.verifier", "importance_lp", papers=[50])
class ImportanceByProgram(Importance):
    """Chooses one of the drafts as a linear program says, then accepts or rejects it as a single draft from the
    chosen's law: of independent drafts, no verifier accepts more.

    For places at which few tokens can come, as with top-k or min-p and at low temperatures. From the paper: the two
    steps, the program over all sets of drafts, and that its optimum is that of all schemes. Ours: of a set, only the
    tokens that the target has, which makes the program small; what drafts of a set are chosen for that the program
    leaves open; and that the second step goes by the law of the choice as it was rounded, so that the target's law is
    kept at any tolerance of the solver. Elsewhere weights choose, as those of ``importance`` do. A program is solved
    for each place, on the host.

    Attributes:
        tokens: up to so many tokens that both distributions have, the program is solved.
    """

    tokens: Annotated[int, Field(ge=1, le=32)] = 16

    def chances(self, target: Tensor, proposal: Tensor, drafted: Tensor) -> Tensor:
        found = super().chances(target, proposal, drafted)
        counts = (drafted >= 0).sum(-1)
        common = ((target > 0) & (proposal > 0)).sum(-1)
        # One draft is chosen in any case, and where nothing is in common, nothing is accepted.
        for row in ((counts > 1) & (common > 0) & (common <= self.tokens)).nonzero().flatten().tolist():
            count = int(counts[row])
            if math.comb(int(common[row]) + count, count) <= MOST:
                found[row] = _chances(target[row], proposal[row], drafted[row, :count])
        return found

    @classmethod
    def example(cls) -> Example:
        # Two drafts: the least over sets S of q(S) + 1 - p(S)^2, q being the target, is that of the first and the third
        # token, 1/4 + 1 - 9/16.
        return Example([0.25, 0.75, 0.0], [0.5, 0.25, 0.25], [0.5, 0.6875])


def _chances(target: Tensor, proposal: Tensor, drafted: Tensor) -> Tensor:
    """The distribution [V] of what comes out of one place, given its ``drafted`` tokens int64 [k], and those [V] of the
    ``target`` and the ``proposal``."""
    common = ((target > 0) & (proposal > 0)).nonzero().flatten()
    q = proposal.double().cpu().numpy()
    own = q[common.cpu().numpy()]
    # What the target does not have counts as one token, which is worth nothing.
    drawn = np.append(own, max(0.0, q.sum() - own.sum())) / q.sum()
    chosen, shares = best_choice(target[common].double().cpu().numpy(), drawn, len(drafted))
    known = set(drafted.tolist())
    here = tuple(place for place, token in enumerate(common.tolist()) if token in known)
    law = torch.zeros_like(target).index_copy(0, common, torch.from_numpy(chosen).to(target))
    share = torch.from_numpy(shares[here]).to(target)
    drafts = common[list(here)]
    taken = share * accepted(target[drafts], law[drafts])
    return mixed(taken[None], drafts[None], leftover(target[None], law[None]))[0]


def best_choice(
    target: np.ndarray, drawn: np.ndarray, count: int
) -> tuple[np.ndarray, dict[tuple[int, ...], np.ndarray]]:
    """How one of ``count`` drafts is best chosen.

    Args:
        target: float64 [n], the target's probability of each of the tokens that may be drafted and come out.
        drawn: float64 [n + 1], the probabilities by which they are drafted, and that of all that cannot come out.

    Returns:
        How likely each token is chosen, float64 [n]; and of each set of tokens that may be drafted together, by their
        numbers, ascending, the shares by which its tokens are.
    """
    draws = _draws(len(target), count)
    ways = draws.ways * drawn[draws.drafts].prod(-1)
    weights = np.bincount(draws.sets, ways, len(draws.members))
    sizes = np.array([len(each) for each in draws.members])
    owners = np.repeat(np.arange(len(sizes)), sizes)
    tokens = np.fromiter(itertools.chain.from_iterable(draws.members), np.int64, sizes.sum())
    # How much of each set goes to each of its tokens: no more than there is of the set, and is wanted of the token.
    flows = np.arange(len(tokens))
    bounds = coo_array((np.ones(2 * len(tokens)), (np.append(owners, len(sizes) + tokens), np.append(flows, flows))))
    limits = np.append(weights, target)
    solved = linprog(-np.ones(len(tokens)), bounds.tocsr(), limits, method="highs", options=TOLERANCES)
    flow = np.clip(solved.x, 0, None) if solved.x is not None else np.zeros(len(tokens))
    # What is left of a set is shared among its tokens: one of them is chosen in any case.
    left = np.clip(weights - np.bincount(owners, flow, len(sizes)), 0, None)
    flow += (left / np.maximum(sizes, 1))[owners]
    total = np.bincount(owners, flow, len(sizes))[owners]
    share = np.where(total > 0, flow / np.where(total > 0, total, 1), 1 / sizes[owners])
    chosen = np.bincount(tokens, share * weights[owners], len(target))
    ends = sizes.cumsum()
    return chosen, {each: share[end - len(each) : end] for each, end in zip(draws.members, ends, strict=True)}


class Draws(NamedTuple):
    """All ways to draw some drafts from n tokens and one more that is worth nothing.

    Attributes:
        drafts: int64 [D, k], each way without regard to order.
        ways: float64 [D], how many orders it has.
        sets: int64 [D], which of ``members`` it has drafted.
        members: each set of the n tokens that can be.
    """

    drafts: np.ndarray
    ways: np.ndarray
    sets: np.ndarray
    members: list[tuple[int, ...]]


@functools.lru_cache(maxsize=64)
def _draws(tokens: int, count: int) -> Draws:
    """Those of ``count`` drafts from so many ``tokens``."""
    drafts = list(itertools.combinations_with_replacement(range(tokens + 1), count))
    members: dict[tuple[int, ...], int] = {}
    sets = [members.setdefault(tuple(sorted(set(each) - {tokens})), len(members)) for each in drafts]
    orders = [
        math.factorial(count) / math.prod(math.factorial(each.count(one)) for one in set(each)) for each in drafts
    ]
    return Draws(np.array(drafts), np.array(orders), np.array(sets), list(members))
