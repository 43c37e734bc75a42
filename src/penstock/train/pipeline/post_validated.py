"""Updates that no device of a pipeline waits for: :mod:`penstock.pipeline.run.post_validation` between processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from penstock.pipeline.run.grid import Grid
from penstock.pipeline.run.post_validation import PendingStep, squared_norm

#: Tells these messages from those of stages, which go the same ways.
_TAG = 1


class Settled(NamedTuple):
    """What became of an update: whether it was right at once, and its loss and norms, over all devices."""

    kept: bool
    measured: dict[str, Tensor]


class PostValidated:
    """The updates of one process, each proposed at the end of a step and settled in the next one.

    What the devices of a pipeline exchange are three numbers: the sum of squared gradients, the sum of their absolute
    values and the loss, of all devices so far on the way down and of all on the way back.

    Args:
        grid: the processes; several pipelines do the same, each for itself, as they have the same gradients.
        optimizer: of this process's weights.
        owned: those of its parameters that this device counts, by name, which no device before it has.
        clip: the largest norm of the whole gradient; None does not clip.
    """

    def __init__(
        self, grid: Grid, optimizer: torch.optim.Optimizer, owned: Mapping[str, Tensor], clip: float | None
    ) -> None:
        self._grid, self._optimizer, self._owned, self._clip = grid, optimizer, owned, clip
        self._pending: PendingStep | None = None
        self._whole = torch.zeros(3, dtype=torch.float64)
        self._sent: list[dist.Work] = []
        neighbours = range(grid.devices - 1)
        links = [(d, d + 1) for d in neighbours] + [(d + 1, d) for d in neighbours]
        grid.connect(links, torch.device("cpu"))

    def propose(self, loss: Tensor) -> None:
        """Takes the update by what the devices before this one and this one know, and tells the next one.

        Args:
            loss: this device's share of that of all pipelines.
        """
        device = self._grid.device
        square = squared_norm(self._owned.values())
        gradients = [p.grad for p in self._owned.values() if p.grad is not None]
        absolute = [torch.linalg.vector_norm(gradient, 1, dtype=torch.float64) for gradient in gradients]
        total = torch.stack(absolute).sum() if absolute else torch.zeros(())
        own = torch.stack([number.cpu().double() for number in (square, total, loss)])
        known = own + self._receive(device - 1, "what it and those before it know of the gradient") if device else own
        # The others are told first, and work while this one takes its step.
        if device + 1 < self._grid.devices:
            self._send(device + 1, known)
        else:
            self._whole = known
            self._pass_back()
        self._pending = PendingStep(self._optimizer, known[0], self._clip)

    def settle(self) -> Settled | None:
        """Makes the update that was proposed the right one; None where there is none."""
        if self._pending is None:
            return None
        device = self._grid.device
        if device + 1 < self._grid.devices:
            self._whole = self._receive(device + 1, "the whole gradient's norm")
            self._pass_back()
        kept = self._pending.settle(self._whole[0])
        self._pending = None
        square, absolute, loss = self._whole
        return Settled(kept, {"loss": loss.float(), "grad_norm": square.sqrt().float(), "grad_l1": absolute.float()})

    def _pass_back(self) -> None:
        if self._grid.device:
            self._send(self._grid.device - 1, self._whole)

    def _send(self, device: int, numbers: Tensor) -> None:
        self._sent = [work for work in self._sent if not work.is_completed()]
        here, there = self._grid.rank(self._grid.device), self._grid.rank(device)
        with self._grid.explained(there, "its receipt of the gradient's norm"):
            work = dist.isend(numbers, there, self._grid.group("link", (here, there)), tag=_TAG)
        assert work is not None
        self._sent.append(work)

    def _receive(self, device: int, what: str) -> Tensor:
        here, there = self._grid.rank(self._grid.device), self._grid.rank(device)
        numbers = torch.zeros(3, dtype=torch.float64)
        with self._grid.explained(there, what):
            dist.recv(numbers, there, self._grid.group("link", (there, here)), tag=_TAG)
        return numbers
