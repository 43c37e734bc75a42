"""The first tokens and the newest ones."""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import Tensor

from penstock.policy import policy
from penstock.serve.kv.policies.contract import Cached, Selecting, with_newest


@policy("kv.policy", "sink_window")
class SinkWindow(Selecting):
    """Keeps the first ``sinks`` tokens of a text, on which attention rests that wants nothing, and its newest ones, as
    StreamingLLM does. It looks at nothing, and costs the least.

    Ours: keys keep the rotation of their position in the text, where StreamingLLM rotates anew by the place in the
    cache.

    Attributes:
        sinks: how many of the first tokens stay.
    """

    sinks: PositiveInt = 4

    @property
    def least(self) -> int:
        return self.sinks + 1

    def select(self, cached: Cached, count: int) -> Tensor:
        heads, length = cached.keys.shape[:-2], cached.keys.shape[-2]
        earliness = -torch.arange(length, device=cached.keys.device).expand(*heads, length)
        return with_newest(earliness, count, count - self.sinks)
