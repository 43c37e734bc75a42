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

    From the paper: independent thoughts, each behind a beginning of its own; a summary that sees them all, and reads
    their keys and values as they are, with the engine setting ``kv_reuse = ape``: nothing of them is computed again but
    the last token of each. From knowledge: the first to end ends the others. Ours: the wording in place of trained
    control tokens; all thoughts have the same positions, behind the prompt, and the summary those behind the longest.
    With other settings the summary stands behind the first thought, and the others are computed once more as text. Not
    built: the training, and with it the embeddings that tell one thought's positions from another's.

    Attributes:
        thoughts: with one there is no summary.
        begin: what stands before a thought, with its ``{number}``.
        summarise: what stands behind all of them.
    """

    thoughts: PositiveInt = 4
    begin: str = "\n\nThought {number}:\n"
    summarise: str = "\n\nTherefore:\n"

    async def run(self, search: Search) -> Branch | None:
        if self.thoughts == 1:
            return await search.root.fork(1)[0].extend()
        alike, numbered, unlike = self.begin.partition("{number}")  # what begins all of them is computed once
        thoughts = search.root.fork(1)[0].append(alike).fork(self.thoughts)
        for number, each in enumerate(thoughts, 1):
            each.ask(f"{number}{unlike}" if numbered else "")
        await search.first(thoughts, drop=False)
        summary = await search.beside(thoughts, self.summarise).extend()
        for each in thoughts:
            each.drop()
        return summary

    @classmethod
    def limit(cls) -> Program:
        return cls(thoughts=1)
