"""Priority sampling: other texts begin where the model was most in two minds."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.search import Search
from penstock.search.shared.alternatives import turned


@policy("search.program", "priority", papers=[152])
class Priority(Program):
    """Draws ``n`` texts that all differ, without chance: the first is greedy; each place of a text queues the tokens
    that were not taken there by their probability, and each further text takes the most probable of all that wait,
    behind the same beginning, and is greedy from there on. The scorer chooses among them; without one the first is the
    answer.

    From the paper: all of it; a regular expression is the grammar of the sampling options. Ours: of equals the earlier
    one goes first.

    Attributes:
        n: texts.
        top: tokens that are queued for each place, with the one that was taken; all of a model with fewer.
        temperature: 0 is greedy; None draws as the search does.
    """

    n: PositiveInt = 8
    top: Annotated[int, Field(ge=1, le=20)] = 20
    temperature: NonNegativeFloat | None = 0.0

    async def run(self, search: Search) -> Branch | None:
        queue: list[tuple[float, int, int, int, Branch]] = []
        text = search.root.fork(1, temperature=self.temperature)[0]
        begun, found = len(text.tokens), [text]
        while True:
            await text.extend(top=self.top)
            for place in range(begun, len(text.tokens)):
                for rank, (token, logprob) in enumerate(text.alternatives[place]):
                    if token != text.tokens[place]:
                        heappush(queue, (-logprob, text.number, place, rank, text))
            if len(found) == self.n or not queue:
                break
            _, _, place, rank, other = heappop(queue)
            text = turned(other, place, other.alternatives[place][rank][0])
            begun = len(text.tokens)
            found.append(text)
        return search.best(await search.judge(found))

    @classmethod
    def limit(cls) -> Program:
        return cls(n=1, temperature=None)
