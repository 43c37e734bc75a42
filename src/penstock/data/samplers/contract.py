"""The contract ``data.sampler``."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from penstock.policy import Policy, contract


@contract(
    "data.sampler",
    law="each sample exactly once an epoch; the same indices however the positions are cut (bit-exact resume); another "
    "order in each epoch and for each seed where the policy draws it, and else the same in all",
)
class Sampler(Policy):
    """Maps positions in an endless run to samples. A pure function, so a run's only state is its position.

    Attributes:
        drawn: whether the order is drawn, anew in each epoch and for each seed; else it is always the same.
    """

    drawn: ClassVar[bool] = True

    def indices(self, start: int, count: int, size: int, seed: int) -> npt.NDArray[np.int64]:
        """The samples at positions [start, start + count) of a run over ``size`` samples.

        Returns:
            int64 [count], each in [0, size). Positions [k size, (k + 1) size) are epoch k.
        """
        raise NotImplementedError
