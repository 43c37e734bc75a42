"""What the tokens of a search cost: arithmetic, and the memory that is read for it."""

from __future__ import annotations

from typing import Literal

import numpy as np

from penstock.models.config import DecoderConfig
from penstock.plan.hardware import DEVICES, Hardware

#: What a budget can be given in: tokens that were generated; tokens that were computed, those of prompts too;
#: arithmetic operations; Kinetics' eFLOPs.
Unit = Literal["generated", "tokens", "flops", "eflops"]


class Prices:
    """What it costs to compute the tokens of a sequence, position by position.

    eFLOPs add to the arithmetic what could have been computed while memory was read: bytes times the device's
    operations per byte (Kinetics [337]; the form is from knowledge). Keys and values are read for each token. Weights
    are read once for all sequences of a batch, and are left out where no batch is given, as in one that is large.

    With sparse attention a token looks at ``keep`` tokens at most. To choose them, it scores one key for each ``block``
    of those that it could see, without a value; where it may keep all of them, there is nothing to choose.

    Args:
        model: the shape.
        hardware: whose operations per byte count; an H100's by default.
        width: bytes of a number in the cache, and of a weight.
        keep: tokens that a token looks at in a layer, at most; None for all.
        block: tokens that are chosen together.
        batch: sequences that share a reading of the weights, all experts' among them; None leaves it out.
    """

    def __init__(
        self,
        model: DecoderConfig,
        hardware: Hardware | None = None,
        width: int = 2,
        *,
        keep: int | None = None,
        block: int = 16,
        batch: int | None = None,
    ) -> None:
        device = hardware or DEVICES["h100"]
        lengths = np.arange(1, model.context + 1, dtype=np.float64)
        looked = np.zeros_like(lengths)
        for layer in range(model.layers):
            seen = np.minimum(lengths, model.window_of(layer) or np.inf)
            looked += seen if keep is None else np.where(seen <= keep, seen, keep + np.ceil(seen / block) / 2)
        flops = 2.0 * model.matmul_parameters() + model.pair_flops * looked
        read = width * (model.kept * looked + (model.read_parameters() / batch if batch else 0))
        each = {"tokens": np.ones_like(lengths), "flops": flops, "eflops": flops + read * device.intensity}
        self._sums = {unit: np.concatenate([[0.0], np.cumsum(cost)]) for unit, cost in each.items()}

    def cost(self, unit: Unit, first: int, last: int) -> float:
        """Of the positions ``first`` to ``last``, which is not among them; 0 in units that count something else."""
        sums = self._sums.get(unit)
        return 0.0 if sums is None else float(sums[last] - sums[first])
