"""What the end of the prompt looks at."""

from __future__ import annotations

from pydantic import PositiveInt, model_validator
from torch import Tensor
from torch.nn.functional import avg_pool1d

from penstock.policy import policy
from penstock.serve.kv.policies.contract import Cached, Selecting, watched, with_newest


@policy("kv.policy", "snapkv")
class SnapKV(Selecting):
    """Keeps what the last ``window`` tokens look at, with what is around it, and those tokens.

    The rule that most people compare with: the attention of the last queries of the prompt votes for the tokens before
    them, and votes are averaged over ``pool`` neighbours, so that what stays are phrases rather than words. Ours: the
    same rule again while the text grows.

    Attributes:
        window: how many of the last queries vote; their tokens stay.
        pool: how many neighbours' votes are averaged; odd.
    """

    window: PositiveInt = 32
    pool: PositiveInt = 7

    @model_validator(mode="after")
    def _odd(self) -> SnapKV:
        if self.pool % 2 == 0:
            raise ValueError(f"pool is {self.pool}, and the neighbours on both sides are as many: take an odd number")
        return self

    @property
    def watches(self) -> int:
        return self.window

    @property
    def least(self) -> int:
        return self.window + 1

    def select(self, cached: Cached, count: int) -> Tensor:
        votes = watched(cached).sum(-2)
        flat = votes.reshape(-1, 1, votes.shape[-1])
        pooled = avg_pool1d(flat, self.pool, 1, self.pool // 2, count_include_pad=False).view_as(votes)
        return with_newest(pooled, count, self.window)
