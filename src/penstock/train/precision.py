"""Which numbers multiply and which are updated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from penstock.parallel.shard import like
from penstock.train.folders import Trained

Precision = Literal["fp32", "autocast", "bf16"]

#: So many gradients are converted at a time: to convert each by itself takes a device longer to begin than to do, and
#: of more, both precisions are in memory at once.
TOGETHER = 2**26


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
        pairs = [(own, self.masters[name]) for name, own in self._own.items() if own.grad is not None]
        for group in _groups(pairs):
            masters = [master for _, master in group]
            wide = [torch.empty_like(master) for master in masters]
            torch._foreach_copy_(wide, [cast(Tensor, own.grad) for own, _ in group])
            known = [master.grad for master in masters if master.grad is not None]
            if known:
                added = [each for each, master in zip(wide, masters, strict=True) if master.grad is not None]
                torch._foreach_add_(known, added)
            for (own, master), each in zip(group, wide, strict=True):
                own.grad = None
                if master.grad is None:
                    master.grad = each

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


def _groups(pairs: Sequence[tuple[Tensor, nn.Parameter]]) -> Iterator[list[tuple[Tensor, nn.Parameter]]]:
    """Weights and their masters in groups of up to :data:`TOGETHER` numbers, or one that has more."""
    group: list[tuple[Tensor, nn.Parameter]] = []
    numbers = 0
    for pair in pairs:
        size = pair[1].numel()
        if group and numbers + size > TOGETHER:
            yield group
            group, numbers = [], 0
        group.append(pair)
        numbers += size
    if group:
        yield group
