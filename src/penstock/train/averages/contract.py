"""The contract ``train.average``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from penstock.policy import Policy, contract


@contract("train.average", law="after any number of updates, equal to its closed form over the recorded weights")
class Average(Policy):
    """A running average of the weights, beside the weights themselves.

    ``elementwise``: no weight's average depends on another weight, so that processes that hold parts of a model can
    average each their own.
    """

    elementwise: ClassVar[bool] = True

    def update(self, averages: Sequence[Tensor], weights: Sequence[Tensor], count: int) -> None:
        """Takes the ``weights`` after update number ``count`` (from 1) into ``averages``, in place.

        Before the first call the averages are the initial weights.
        """
        raise NotImplementedError
