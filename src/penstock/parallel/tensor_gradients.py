"""Tensor parallelism with gradients: ranks that have a share of each layer compute together what whole layers would.

What a token is stands on all ranks alike, before an attention or a feed-forward block and after it. So the gradient of
what goes into a block is the sum of what the ranks find for their shares, and what comes out is a sum whose gradient is
everybody's: the two conjugate exchanges of Megatron-LM (Shoeybi et al., 2019). Embedding, norms between the blocks, and
head are computed by each rank, whole.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.library import Library, register_fake

from penstock.models.decoder import Attention, Decoder, Layer
from penstock.models.linear import Linear
from penstock.ops.linear import linear
from penstock.parallel.tensor import WidelyNormedAttention

#: By their names, which an operator can be given.
_groups: dict[str, dist.ProcessGroup] = {}

_library = Library("penstock", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("sum_of_group(Tensor x, str group) -> Tensor")  # type: ignore[no-untyped-call]


def _sum(x: Tensor, group: str) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_groups[group])
    return total


for _device in ("CPU", "CUDA"):
    _library.impl("sum_of_group", _sum, _device)  # type: ignore[no-untyped-call]
register_fake("penstock::sum_of_group", lambda x, group: x.new_empty(x.shape), lib=_library)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.ops.penstock.sum_of_group(grad, ctx.group), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        total: Tensor = torch.ops.penstock.sum_of_group(x, group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def spread(x: Tensor, group: str) -> Tensor:
    """``x``, which all ranks of the ``group`` have alike, for each to use in its own way: its gradient is the sum of
    theirs."""
    found: Tensor = _Spread.apply(x, group)  # type: ignore[no-untyped-call]
    return found


def summed(x: Tensor, group: str) -> Tensor:
    """The sum of what each rank of the ``group`` gives, for all to use alike: its gradient is that of each ``x``."""
    found: Tensor = _Summed.apply(x, group)  # type: ignore[no-untyped-call]
    return found


class SummedLinear(Linear):
    """A linear layer of whose columns each rank of the ``group`` has some; the bias is everybody's, and added once."""

    group: str

    def forward(self, x: Tensor) -> Tensor:
        total = summed(linear(x, self.weight), self.group)
        return total if self.bias is None else total + self.bias


class TrainedWidelyNormedAttention(WidelyNormedAttention):
    """The same with gradients, of the ``group``."""

    group: str

    def sum_of_squares(self, own: Tensor) -> Tensor:
        return spread(summed(own, self.group), self.group)


def join_layers(model: Decoder, group: dist.ProcessGroup) -> None:
    """Makes ``model``, whose dense layers are shares of those of a model, compute together with the models of the other
    ranks of the ``group``, which are called with the same tokens at the same time."""
    name = group.group_name
    _groups[name] = group
    for layer in model.layers:
        assert isinstance(layer, Layer)
        for block in (layer.attention, layer.mlp):
            block.register_forward_pre_hook(functools.partial(_spread_first, name))
        for last in (layer.attention.output, layer.mlp.down):
            last.__class__ = SummedLinear
            vars(last)["group"] = name
        if isinstance(layer.attention, Attention) and layer.attention.norms == "width":
            layer.attention.__class__ = TrainedWidelyNormedAttention
            vars(layer.attention).update(ranks=group.size(), group=name)


def _spread_first(group: str, block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return spread(inputs[0], group), *inputs[1:]


def found_in_parts(model: Decoder) -> set[str]:
    """The parameters of which a rank's gradient is a part of a sum over the ranks, unless they are divided: those that
    blocks use between the exchanges at their beginning and their end."""
    found = set[str]()
    for prefix, layer in model.layers.named_children():
        assert isinstance(layer, Layer)
        for key, block in (("attention", layer.attention), ("mlp", layer.mlp)):
            last = {f"{name}.bias" for name, module in block.named_modules() if isinstance(module, SummedLinear)}
            names = {name for name, _ in block.named_parameters()}
            found |= {f"layers.{prefix}.{key}.{name}" for name in names - last}
    return found
