"""Parallel thoughts: several lines of thought, and a summary of all."""

from __future__ import annotations

from pydantic import PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.search import Search


@policy("search.program", "parallel_thoughts", papers=[343])
class ParallelThoughts(Program):
    """Draws ``thoughts`` side by side until the first of them ends, so that none waits for a longer one, and then a
    summary behind the problem and all of them. It needs no scorer.

    From the paper: independent thoughts, and a summary that sees them all. From knowledge: the first to end ends the
    others. Ours: the wording in place of trained control tokens. Not built: the training with position embeddings for
    each thought, and a summary that reads the keys and values of the thoughts as they are: here it shares the prompt's
    blocks, and the thoughts are computed once more, as text.

    Attributes:
        thoughts: with one there is no summary.
        begin: what stands before a thought in the summary's prompt.
        summarise: what stands behind the last one.
    """

    thoughts: PositiveInt = 4
    begin: str = "\n\nOne thought:\n"
    summarise: str = "\n\nTherefore:\n"

    async def run(self, search: Search) -> Branch | None:
        thoughts = search.root.fork(self.thoughts)
        first = await search.first(thoughts)
        if self.thoughts == 1:
            return first
        shown = "".join(self.begin + each.text for each in thoughts)
        return await search.root.fork(1)[0].ask(shown + self.summarise).extend()

    @classmethod
    def limit(cls) -> Program:
        return cls(thoughts=1)
