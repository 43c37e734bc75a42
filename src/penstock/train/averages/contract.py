"""The contract ``train.average``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

from torch import Tensor

from penstock.policy import Policy, contract, unwritten


@contract(
    "train.average",
    law="after any number of updates a mixture of the initial weights and those after each update, the same in all "
    "tensors, in the end of two updates or more, and for weights that stay the weights themselves bit for bit; a "
    "function of averages, weights and count alone; along one run equal to the averages that the policy gives, worked "
    "out by hand; of weights in shards those of whole weights",
)
class Average(Policy):
    """A running average of the weights, beside the weights themselves.

    ``elementwise``: no weight's average depends on another weight, so that processes that hold parts of a model can
    average each their own.

    Weights in shards are DTensors, whose norms are those of all their rows.

    A policy gives :meth:`update`, and :meth:`example` for its law.
    """

    elementwise: ClassVar[bool] = True

    def update(self, averages: Sequence[Tensor], weights: Sequence[Tensor], count: int) -> None:
        """Takes the ``weights`` after update number ``count`` (from 1) into ``averages``, in place.

        Before the first call the averages are the initial weights.
        """
        raise NotImplementedError

    @classmethod
    def example(cls) -> tuple[Self, list[float], list[float]]:
        """An average of this kind; a model's only weight at first and after each of at least three updates; and the
        average after each of these updates.

        Work them out by hand, or take them from the paper: the law holds the code against them.
        """
        what = "return an average, the weights before and after each of some updates, and the averages after each"
        raise unwritten(cls, "example()", what)
