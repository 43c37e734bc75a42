"""Which numbers multiply and which are updated."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor, nn

from penstock.train.folders import Trained

Precision = Literal["fp32", "autocast", "bf16"]


class Weights:
    """The fp32 weights that the optimizer updates, beside the model's own in the precision of its arithmetic.

    In ``fp32`` and ``autocast`` they are the model's own parameters. In ``bf16`` the model is cast, and the masters
    are separate.

    Attributes:
        masters: by the Decoder's parameter name (a tied matrix once).
        separate: whether they are tensors of their own.
    """

    def __init__(self, model: Trained, precision: Precision) -> None:
        self.precision = precision
        self.separate = precision == "bf16"
        self.masters: dict[str, nn.Parameter] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if self.separate:
            self.masters = {n: nn.Parameter(p.detach().float().clone()) for n, p in self.masters.items()}
            model.to(torch.bfloat16)
        self._own = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def arithmetic(self, device: torch.device) -> AbstractContextManager[object]:
        """The context in which the forward pass runs."""
        if self.precision == "autocast":
            return torch.autocast(device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def collect_gradients(self) -> None:
        """Adds the gradients of a backward pass to the masters' and frees the former."""
        if not self.separate:
            return
        for name, master in self.masters.items():
            grad = self._own[name].grad
            if grad is None:
                continue
            if master.grad is None:
                master.grad = grad.float()
            else:
                master.grad.add_(grad)
            self._own[name].grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Copies the masters into the model after an update."""
        if self.separate:
            torch._foreach_copy_(list(self._own.values()), list(self.masters.values()))

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Replaces the masters, and with them the model's weights."""
        for name, master in self.masters.items():
            master.copy_(values[name])
        self.publish()
