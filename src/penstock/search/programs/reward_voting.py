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
    Ours: in place of a judgement that failed stands the mean of the text's others. The paper's principles and critiques
    are the scorer's own business, and its meta reward model, which leaves judgements out, is not here: a scorer can
    leave them out by failing.

    Attributes:
        n: texts.
        votes: judgements of each.
    """

    n: PositiveInt = 4
    votes: PositiveInt = 4

    async def run(self, search: Search) -> Branch | None:
        texts = await search.sample(self.n)
        scores: dict[Branch, list[float]] = {each: [] for each in texts}
        for _ in range(self.votes):
            for each in await search.judge(texts):
                if each.error is None:
                    scores[each].append(each.worth)
        for each, found in scores.items():
            if found:
                each.score, each.error = self.votes * sum(found) / len(found), None
        search.notes["votes"] = self.votes
        return search.best(texts)

    @classmethod
    def limit(cls) -> Program:
        return cls(n=1, votes=1)
