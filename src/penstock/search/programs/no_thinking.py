"""Many short answers without thinking."""

from __future__ import annotations

from pydantic import PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.search import Search


@policy("search.program", "no_thinking", papers=[341])
class NoThinking(Program):
    """Draws ``n`` answers of a reasoning model in parallel, each of which begins behind a thought that is already over,
    and takes the one that the scorer likes best: a verifier where there is one, else ``self_certainty``.

    From the paper: thinking is skipped, and width stands in for it. From knowledge: the thought that is put into its
    mouth is empty. Ours: that text is an option, since models differ in how they write thoughts.

    Attributes:
        n: answers.
        skip: what they begin behind.
    """

    n: PositiveInt = 8
    skip: str = "<think>\n\n</think>\n\n"

    async def run(self, search: Search) -> Branch | None:
        begun = search.root.fork(1)[0]
        if self.skip:
            begun.ask(self.skip)
        return search.best(await search.judge(await search.extend(begun.fork(self.n))))

    @classmethod
    def limit(cls) -> Program:
        return cls(n=1, skip="")
