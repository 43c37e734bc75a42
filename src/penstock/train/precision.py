"""Which numbers multiply and which are updated."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from penstock.parallel.shard import like
from penstock.train.folders import Trained

Precision = Literal["fp32", "autocast", "bf16"]


class Weights:
    """The fp32 weights that the optimizer updates, beside the model's own in the precision of its arithmetic.

    In ``fp32`` and ``autocast`` they are the model's own parameters. In ``bf16`` the model is cast, and the masters
    are separate; those of a model in shards are its own also then, since its layers round them when they put them
    together.

    Attributes:
        masters: by the Decoder's parameter name (a tied matrix once).
        rounded: whether the arithmetic sees them rounded.
        separate: whether they are tensors of their own.
        dtype: of the weights in the arithmetic.
    """

    def __init__(self, model: Trained, precision: Precision) -> None:
        self.precision = precision
        self.masters: dict[str, nn.Parameter] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._sharded = any(isinstance(p, DTensor) for p in model.parameters())
        self.rounded = precision == "bf16"
        self.separate = self.rounded and not any(isinstance(master, DTensor) for master in self.masters.values())
        self.dtype = torch.bfloat16 if self.rounded else torch.float32
        if self.separate:
            self.masters = {n: nn.Parameter(p.detach().float().clone()) for n, p in self.masters.items()}
            model.to(torch.bfloat16)
        self._own = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def arithmetic(self, device: torch.device) -> AbstractContextManager[object]:
        """The context in which the forward pass runs."""
        if self.precision == "autocast":
            # What is put together from shards is not to stay beyond its use.
            return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=not self._sharded)
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
            value = values[name]
            master.copy_(value if isinstance(value, DTensor) else like(master, value))
        self.publish()
