"""The best of n samples by several judgements of each."""

from __future__ import annotations

from pydantic import PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.search import Search


@policy("search.program", "reward_voting", papers=[444])
class RewardVoting(Program):
    """Draws ``n`` texts and has each judged ``votes`` times by a scorer that draws its judgements, such as a generative
    reward model; the text whose scores add up to the most is the answer.

    From the paper: several judgements of each text, drawn independently. From knowledge: their scores are added up.
    Ours: a judgement that failed adds 0. The paper's principles and critiques are the scorer's own business, and its
    meta reward model, which leaves judgements out, is not here: a scorer can leave them out by the score 0.

    Attributes:
        n: texts.
        votes: judgements of each.
    """

    n: PositiveInt = 4
    votes: PositiveInt = 4

    async def run(self, search: Search) -> Branch | None:
        texts = await search.sample(self.n)
        sums = [0.0] * len(texts)
        for _ in range(self.votes):
            await search.judge(texts)
            sums = [total + (each.score or 0.0) for total, each in zip(sums, texts, strict=True)]
        for each, total in zip(texts, sums, strict=True):
            each.score = total
        search.notes["votes"] = self.votes
        return search.best(texts)

    @classmethod
    def limit(cls) -> Program:
        return cls(n=1, votes=1)
