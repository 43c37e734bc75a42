"""Particle filtering: partial texts are resampled by what they promise."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.search import Search
from penstock.search.shared.allotting import prune
from penstock.search.shared.resampling import effective, log_mean, normalised, systematic


@policy("search.program", "particle", papers=[413])
class Particle(Program):
    """Sequential Monte Carlo over steps: after each step every particle is weighted by exp(score / temperature) over
    what it had before, and, where the weights are uneven, ``particles`` are drawn from them again: good ones are
    forked, poor ones dropped. In the end a text is drawn by weight, or the best is taken.

    The weights telescope, so that the filter aims at p(x) exp(score(x) / temperature) / Z, and the product of the mean
    weights is an unbiased estimate of Z, noted as ``log_evidence``.

    From the paper: particles, a process reward as likelihood, resampling in place of pruning; Gibbs and tempering are
    programs of their own, ``particle_gibbs`` and ``particle_tempering``. Ours: systematic resampling, and only below
    half of the particles in effect.

    Attributes:
        particles: how many.
        temperature: of the scores; smaller is greedier.
        resample: the share of particles in effect below which they are resampled; 1 does so after every step that
            leaves the weights uneven.
        greedy: take the best text, not one drawn by weight.
        steps: at most.
    """

    particles: PositiveInt = 8
    temperature: PositiveFloat = 0.1
    resample: Annotated[float, Field(ge=0, le=1)] = 0.5
    greedy: bool = True
    steps: PositiveInt = 64

    async def run(self, search: Search) -> Branch | None:
        branches = search.root.fork(self.particles)
        swarm = await filtered(search, branches, 1 / self.temperature, self.resample, self.steps)
        search.notes["log_evidence"] = swarm.log_evidence
        return search.best(swarm.branches) if self.greedy else swarm.drawn(search)

    @classmethod
    def limit(cls) -> Program:
        return cls(particles=1)


class Swarm:
    """Particles and their weights.

    Attributes:
        branches: the particles.
        logs: logarithms of their weights.
        log_evidence: the logarithm of the estimate of Z.
    """

    def __init__(self, branches: list[Branch]) -> None:
        self.branches, self.logs, self.log_evidence = branches, [0.0] * len(branches), 0.0

    @property
    def weights(self) -> list[float]:
        """Of the particles; they add up to 1."""
        return normalised(self.logs)

    def weigh(self, gains: list[float]) -> None:
        """Multiplies the weights by exp(``gains``)."""
        self.logs = [log + gain for log, gain in zip(self.logs, gains, strict=True)]

    def settle(self) -> None:
        """The mean weight goes into the evidence; from here on all weigh the same."""
        self.log_evidence += log_mean(self.logs)
        self.logs = [0.0] * len(self.branches)

    def resample(self, search: Search) -> None:
        """Draws the particles anew by their weights."""
        counts = systematic(self.weights, len(self.branches), search.choose)
        before, self.branches = self.branches, copies(self.branches, counts)
        prune(before, [each for each, count in zip(before, counts, strict=True) if count])
        self.settle()

    def drawn(self, search: Search) -> Branch:
        """A particle, drawn by weight."""
        return self.branches[search.choose(self.weights)]


def copies(branches: list[Branch], counts: list[int]) -> list[Branch]:
    """So many forks of each; one that is wanted once, or has ended, goes on as it is, or is there several times."""
    made: list[Branch] = []
    for branch, count in zip(branches, counts, strict=True):
        made += [branch] * count if branch.finished or count == 1 else branch.fork(count)
    return made


async def filtered(search: Search, branches: list[Branch], inverse: float, least: float, steps: int) -> Swarm:
    """Particles that grew from ``branches`` step by step, weighted by exp(``inverse`` * score), with the evidence of
    all steps in theirs. One on which the scorer fails weighs 0 while it does."""
    swarm, base = Swarm(branches), [0.0] * len(branches)  # logarithms of weights, less what particles are worth now
    for _ in range(steps):
        going = list(dict.fromkeys(each for each in swarm.branches if not each.finished))
        if not going or search.exhausted:
            break
        await search.judge(await search.extend(going, step=True))
        swarm.logs = [log + inverse * each.worth for log, each in zip(base, swarm.branches, strict=True)]
        weights = swarm.weights
        if max(swarm.logs) - min(swarm.logs) > 1e-12 and effective(weights) <= least * len(weights):
            swarm.resample(search)
            base = [-inverse * each.worth for each in swarm.branches]
    if math.isfinite(max(swarm.logs)):
        swarm.log_evidence += log_mean(swarm.logs)
    return swarm
