"""Parallel tempering: filters at several temperatures that exchange their texts."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.programs.particle import filtered
from penstock.search.search import Search


@policy("search.program", "particle_tempering", papers=[413])
class ParticleTempering(Program):
    """Runs a particle filter at each of several temperatures side by side; hot ones explore, cold ones exploit. Then
    neighbours exchange the texts that they drew with the chance min(1, exp((1/T1 - 1/T2) (s2 - s1))), from the hottest
    down, and the coldest one's is the answer.

    From the paper: parallel tempering over particle filters. Ours (the abstract gives no details): a single exchange of
    finished texts, by the rule of Metropolis.

    Attributes:
        particles: of each filter.
        temperatures: of the scores, the coldest first.
        steps: of a text, at most.
    """

    particles: PositiveInt = 4
    temperatures: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.1, 0.3)
    steps: PositiveInt = 64

    async def run(self, search: Search) -> Branch | None:
        count = self.particles
        branches = search.root.fork(count * len(self.temperatures))
        works = (
            filtered(search, branches[place * count : (place + 1) * count], 1 / heat, 0.5, self.steps)
            for place, heat in enumerate(self.temperatures)
        )
        drawn = [swarm.drawn(search) for swarm in await search.together(works)]
        for hot in range(len(drawn) - 1, 0, -1):
            gain = 1 / self.temperatures[hot - 1] - 1 / self.temperatures[hot]
            gain *= drawn[hot].worth - drawn[hot - 1].worth
            chance = math.exp(min(0.0, gain))
            if search.choose([chance, 1 - chance]) == 0:
                drawn[hot - 1], drawn[hot] = drawn[hot], drawn[hot - 1]
        return drawn[0]

    @classmethod
    def limit(cls) -> Program:
        return cls(particles=1, temperatures=(1.0,))
