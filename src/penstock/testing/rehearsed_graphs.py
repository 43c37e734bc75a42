"""Stand-ins for CUDA graphs on a device that has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from penstock.ops.paged.contract import PagedBatch, StepShape
from penstock.serve.run.graphs import NOBODY, Captured, StepGraphs


class Again:
    """In place of a graph: computes ``run`` once more, into the same ``output``."""

    def __init__(self, run: Callable[[Tensor], Any], inputs: Tensor, output: tuple[Tensor, ...]) -> None:
        self._run, self._inputs, self._output = run, inputs, output

    def replay(self) -> None:
        for place, new in zip(self._output, self._run(self._inputs), strict=True):
            if place.data_ptr() != new.data_ptr():
                place.copy_(new)


class RehearsedGraphs(StepGraphs):
    """Graphs of a pass that gives a tuple of tensors, computed anew at each replay."""

    def _capture(self, shape: StepShape) -> Captured:
        inputs = torch.zeros(self._fields, shape.rows, dtype=torch.int64)
        with torch.inference_mode():
            self._plan(NOBODY, shape)
            output = self._run(inputs)
        return Captured(cast(Any, Again(self._run, inputs, output)), inputs, output)

    def replay(self, shape: StepShape, inputs: np.ndarray, batch: PagedBatch) -> tuple[Any, np.ndarray]:
        # A device copies what is published before the next replay overwrites it; here it would be published as it lies.
        output, rows = super().replay(shape, inputs, batch)
        return tuple(each.clone() for each in output), rows
