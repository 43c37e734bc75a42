"""What the tokens of a search cost: arithmetic, and the memory that is read for it."""

from __future__ import annotations

from typing import Literal

import numpy as np

from penstock.models.config import DecoderConfig
from penstock.ops.paged.selection import BlockSelection
from penstock.plan.hardware import DEVICES, Hardware

#: What a budget can be given in: tokens that were generated; tokens that were computed, those of prompts too;
#: arithmetic operations; Kinetics' eFLOPs.
Unit = Literal["generated", "tokens", "flops", "eflops"]


class Prices:
    """What it costs to compute the tokens of a sequence, position by position.

    eFLOPs add to the arithmetic what could have been computed while memory was read: bytes times the device's
    operations per byte (Kinetics [337]; the form is from knowledge). Keys and values are read for each token. Weights
    are read once for all sequences of a batch, and are left out where no batch is given, as in one that is large.

    With sparse attention a token behind the prompt reads its blocks, and for choosing them the mean key of each block
    that it could choose, which all its query heads score, without a value; where it reads all, there is nothing to
    choose. That mean keys lie ready is what a kernel for it would have; the readable backend makes them anew. Layers
    with a sliding window read that.

    Args:
        model: the shape.
        hardware: whose operations per byte count; an H100's by default.
        width: bytes of a number in the cache, and of a weight.
        selection: what tokens behind the prompt read; None for all.
        batch: sequences that share a reading of the weights, all experts' among them; None leaves it out.
    """

    def __init__(
        self,
        model: DecoderConfig,
        hardware: Hardware | None = None,
        width: int = 2,
        *,
        selection: BlockSelection | None = None,
        batch: int | None = None,
    ) -> None:
        device = hardware or DEVICES["h100"]
        lengths = np.arange(1, model.context + 1, dtype=np.float64)

        def sums(reads: np.ndarray) -> dict[str, np.ndarray]:
            windows = [model.window_of(layer) for layer in range(model.layers)]
            looked = sum(reads if window is None else np.minimum(lengths, window) for window in windows)
            flops = 2.0 * model.matmul_parameters() + model.pair_flops * looked
            read = width * (model.kept * looked + (model.read_parameters() / batch if batch else 0))
            each = {"tokens": np.ones_like(lengths), "flops": flops, "eflops": flops + read * device.intensity}
            return {unit: np.concatenate([[0.0], np.cumsum(cost)]) for unit, cost in each.items()}

        self._dense = self._sparse = sums(lengths)
        if selection is not None:
            pairs = np.array([selection.reads(int(length)) for length in lengths], np.float64)
            self._sparse = sums(pairs[:, 0] + pairs[:, 1] / 2)

    def cost(self, unit: Unit, first: int, last: int, given: int | None = None) -> float:
        """Of the positions ``first`` to ``last``, which is not among them, of a text that began with a prompt of
        ``given`` tokens; all of them are, where that is None. 0 in units that count something else."""
        if unit not in self._dense:
            return 0.0
        dense, sparse = self._dense[unit], self._sparse[unit]
        middle = last if given is None else min(max(first, given), last)
        return float(dense[middle] - dense[first] + sparse[last] - sparse[middle])
