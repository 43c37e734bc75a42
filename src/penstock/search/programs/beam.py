"""Beam search over steps."""

from __future__ import annotations

from pydantic import PositiveInt, model_validator

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.search import Search
from penstock.search.shared.allotting import prune, top


@policy("search.program", "beam", papers=[93])
class Beam(Program):
    """Keeps ``width`` texts; step by step, those that go on are forked into ``width`` together, and the ``width /
    expand`` best of what the scorer sees stay (beam search with a process reward, Snell et al. 2024).

    A text that has ended stays in the beam with its score.

    Attributes:
        width: texts at a time.
        expand: children of each that stays.
        steps: at most.
    """

    width: PositiveInt = 8
    expand: PositiveInt = 4
    steps: PositiveInt = 64

    @model_validator(mode="after")
    def _divides(self) -> Beam:
        if self.width % self.expand:
            raise ValueError(f"a width of {self.width} is not divided by {self.expand}")
        return self

    async def run(self, search: Search) -> Branch | None:
        return search.best(await grown(search, search.root, self.width, self.expand, self.steps))

    @classmethod
    def limit(cls) -> Program:
        return cls(width=1, expand=1)


async def grown(search: Search, root: Branch, width: int, expand: int, steps: int) -> list[Branch]:
    """The beam of ``width`` texts that grows from ``root``."""
    beam = await search.judge(await search.extend(root.fork(width), step=True))
    for _ in range(steps - 1):
        if all(each.finished for each in beam) or search.exhausted:
            break
        kept = top(beam, width // expand)
        prune(beam, kept)
        beam = [child for each in kept for child in ([each] if each.finished else each.fork(expand))]
        fresh = [each for each in beam if not each.finished]
        await search.judge(await search.extend(fresh, step=True))
    return beam
