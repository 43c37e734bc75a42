"""Particle Gibbs: sweeps of the filter around the text that the last one drew."""

from __future__ import annotations

import math

from pydantic import PositiveFloat, PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.programs.particle import Swarm
from penstock.search.search import Search
from penstock.search.shared.allotting import prune
from penstock.search.shared.resampling import normalised


@policy("search.program", "particle_gibbs", papers=[413])
class ParticleGibbs(Program):
    """Iterated conditional particle filtering: each sweep runs a filter in which one particle is the text that the
    sweep before drew, step by step as it is; the others compete with it, and a text is drawn by weight. The chain of
    drawn texts has p(x) exp(score(x) / temperature) / Z as its stationary distribution.

    From the paper: particle Gibbs as its iterated variant. Ours (the abstract gives no details): the conditional filter
    of Andrieu et al. 2010 with multinomial resampling, and the best text of all sweeps as the answer. The text that is
    kept is read step by step from its own branches, so that it costs nothing again.

    Attributes:
        particles: of a sweep, the kept one among them.
        sweeps: how many.
        temperature: of the scores.
        greedy: take the best text of all sweeps, not the one that the last drew.
        steps: of a text, at most.
    """

    particles: PositiveInt = 4
    sweeps: PositiveInt = 3
    temperature: PositiveFloat = 0.1
    greedy: bool = True
    steps: PositiveInt = 64

    async def run(self, search: Search) -> Branch | None:
        kept: list[Branch] = []
        drawn: list[Branch] = []
        for _ in range(self.sweeps):
            kept = await self._sweep(search, kept)
            drawn.append(kept[-1])
            if search.exhausted:
                break
        search.notes["texts"] = [each.text for each in drawn]
        return search.best(drawn) if self.greedy else drawn[-1]

    async def _sweep(self, search: Search, kept: list[Branch]) -> list[Branch]:
        """The branches, step by step, of a text that a filter around the text ``kept`` draws."""
        free = self.particles - bool(kept)
        lines: list[list[Branch]] = [[each] for each in search.root.fork(free)]
        swarm = Swarm([*(line[-1] for line in lines), *kept[:1]])
        lines += [kept[:1]] if kept else []
        for step in range(self.steps):
            if not step and kept:
                await search.judge(kept[:1])
            fresh = [each for each in swarm.branches[:free] if not each.finished]
            await search.judge(await search.extend(fresh, step=True))
            before = [self._before(line) for line in lines]
            worth = [each.worth / self.temperature for each in swarm.branches]
            swarm.weigh([after - former for after, former in zip(worth, before, strict=True)])
            if search.exhausted or all(each.finished for each in swarm.branches):
                break
            # A text that has ended stays as it is for the steps that others still go.
            ahead = [*kept[: step + 2], *kept[-1:] * (step + 2 - len(kept))]
            lines = self._resampled(search, swarm, lines, free, ahead)
            swarm = Swarm([line[-1] for line in lines])
        chosen = lines[search.choose(normalised(swarm.logs))]
        prune(swarm.branches[:free], [chosen[-1]])
        return chosen

    def _before(self, line: list[Branch]) -> float:
        """What the text was worth a step before; 0 where the scorer failed on it then."""
        worth = line[-2].worth if len(line) > 1 else 0.0
        return worth / self.temperature if math.isfinite(worth) else 0.0

    def _resampled(
        self, search: Search, swarm: Swarm, lines: list[list[Branch]], free: int, kept: list[Branch]
    ) -> list[list[Branch]]:
        """The lines that go on: free ones drawn by weight, and the kept one."""
        weights = swarm.weights
        made = []
        for _ in range(free):
            line = lines[search.choose(weights)]
            made.append([*line, line[-1] if line[-1].finished else line[-1].fork(1)[0]])
        return [*made, kept] if kept else made

    @classmethod
    def limit(cls) -> Program:
        return cls(particles=1, sweeps=1)
