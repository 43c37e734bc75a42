"""Heavy hitters and the newest tokens."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from penstock.policy import policy
from penstock.serve.kv.policies.contract import Cached, Selecting, attention_drawn, with_newest


@policy("kv.policy", "h2o", papers=[411])
class HeavyHitters(Selecting):
    """Keeps the tokens that drew the most attention so far, and the newest ones, each head its own.

    From the paper [411]: the score of a token is the attention that it drew, summed over the queries; a part of the
    budget is for the tokens with the highest scores and the rest for the newest. Ours: the queries that count are the
    last ``every`` before each compression, not all (those of a long prompt would each be looked at once more), and
    tokens go many at a time, not one in each step.

    Attributes:
        recent: share of the budget that is for the newest tokens.
    """

    recent: Annotated[float, Field(ge=0, le=1)] = 0.5
    remembers: ClassVar[bool] = True

    @property
    def watches(self) -> int:
        return self.every

    @property
    def least(self) -> int:
        return 2

    def select(self, cached: Cached, count: int) -> Tensor:
        return with_newest(attention_drawn(cached), count, round(self.recent * count))
