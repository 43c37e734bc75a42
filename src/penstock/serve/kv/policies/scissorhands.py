"""Tokens that mattered keep mattering."""

from __future__ import annotations

from pydantic import PositiveInt, model_validator
from torch import Tensor

from penstock.policy import policy
from penstock.serve.kv.policies.contract import Cached, Selecting, watched, with_newest


@policy("kv.policy", "scissorhands", papers=[348])
class Scissorhands(Selecting):
    """Throws out the tokens that drew less than the average attention most often over a window of past queries.

    From the paper [348]: importance persists, so that what was not pivotal lately will not be; the newest ``recent``
    tokens stay; when the cache is full, a block of tokens goes at once. Our reading: the average of a query is one
    divided by the number of tokens that it sees, and among tokens that were below it as often, the earlier stays.
    Not built: budgets that differ by layer.

    Attributes:
        history: how many of the last queries count.
        recent: how many of the newest tokens stay in any case.
    """

    history: PositiveInt = 32
    recent: PositiveInt = 10

    @model_validator(mode="after")
    def _seen(self) -> Scissorhands:
        if self.history > self.every:
            raise ValueError(f"history is {self.history}, and the cache is compressed every {self.every} tokens")
        return self

    @property
    def watches(self) -> int:
        return self.history

    @property
    def least(self) -> int:
        return self.recent + 1

    def select(self, cached: Cached, count: int) -> Tensor:
        attention = watched(cached)
        queries, length = attention.shape[-2:]
        seen = length - queries + 1 + attention.new_tensor(range(queries))
        above = (attention * seen[:, None] >= 1).sum(-2)
        return with_newest(above, count, self.recent)
