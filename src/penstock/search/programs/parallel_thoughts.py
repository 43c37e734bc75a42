"""Parallel thoughts: several lines of thought, and a summary of all."""

from __future__ import annotations

import itertools

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
    the last token of each. From knowledge: the first to end ends the others, and control tokens begin thoughts and
    summary: ``begin`` and ``summarise`` may name those that a model has. Ours: words in place of control tokens, for a
    model without them; all thoughts have the same positions, behind the prompt, and the summary those behind the
    longest. With other settings the summary stands behind the first thought, and the others are computed once more as
    text. A model learns to sum up from texts with thoughts in a row, as ``data.corpus/puzzles`` writes them where it is
    ``formed``. Not built: training on thoughts of one's own, under the mask that keeps them apart, and an embedding for
    each thought, which becomes part of its keys and values in every layer (from knowledge): every cache, kernel and
    codec would have to know of it, and what it can win back is what a summary loses by reading thoughts beside each
    other that it has learnt to read in a row, which ``penstock bench search`` tells.

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
        # Whole, since a control token is none in parts; what is alike in all of them is computed once.
        encode = search.root.texts.encode
        begun = [encode(self.begin.replace("{number}", str(number))) for number in range(1, self.thoughts + 1)]
        alike = len([*itertools.takewhile(lambda each: len(set(each)) == 1, zip(*begun, strict=False))])
        thoughts = search.root.fork(1)[0].append(begun[0][:alike]).fork(self.thoughts)
        for each, begin in zip(thoughts, begun, strict=True):
            each.ask(begin[alike:])
        await search.first(thoughts, drop=False)
        summary = await search.beside(thoughts, self.summarise).extend()
        for each in thoughts:
            each.drop()
        return summary

    @classmethod
    def limit(cls) -> Program:
        return cls(thoughts=1)
