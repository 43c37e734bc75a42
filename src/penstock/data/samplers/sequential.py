"""The samples in their stored order."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from penstock.data.samplers.contract import Sampler
from penstock.policy import policy


@policy("data.sampler", "sequential")
class Sequential(Sampler):
    """The samples in their stored order, the same every epoch."""

    drawn: ClassVar[bool] = False

    def indices(self, start: int, count: int, size: int, seed: int) -> npt.NDArray[np.int64]:
        return np.arange(start, start + count, dtype=np.int64) % size
