"""Sharded models: each rank holds some rows of every parameter, of its gradient, and of what the optimizer keeps of it.

A parameter is put together from the rows of all ranks for as long as its layer computes, and its gradient is summed
over the ranks, each of which keeps its own rows (ZeRO stage 3; PyTorch's ``fully_shard``). Groups of ranks may hold the
model as often as there are groups. What is sharded is a ``DTensor``: PyTorch's operators see the whole tensor, and
compute on the rows that are here.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence, Set
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from penstock.core.errors import UsageError
from penstock.parallel.world import World


def mesh_of(world: World, shards: int, device: torch.device) -> DeviceMesh:
    """The ranks as groups of ``shards`` neighbours, each of which holds the model once: [groups, shards], or [shards]
    where there is one group. All processes call this.

    Raises:
        UsageError: the processes do not make whole groups.
    """
    if world.size % shards:
        raise UsageError(
            f"{world.size} processes do not make whole groups of {shards} that hold a model together"
            if world.size > 1
            else f"this is one process, and {shards} are to hold the model together",
            hint=f"Start {shards} processes or a multiple of it, under torchrun, or set parallel.shard=all, which fits "
            "any number.",
        )
    groups = world.size // shards
    with world.explained("a new group of processes"):
        if groups == 1:
            return init_device_mesh(device.type, (shards,), mesh_dim_names=("shard",))
        return init_device_mesh(device.type, (groups, shards), mesh_dim_names=("replicate", "shard"))


@dataclasses.dataclass(frozen=True)
class Meshes:
    """Over which processes what is sharded.

    Attributes:
        layers: those that have the same share of every layer: [groups, shards], or [shards] where there is one group.
        rest: those that have anything of what is not divided into shares, the same way.
        alike: how many processes compute each layer together, and all else alike: neighbours.
        together: these.
    """

    layers: DeviceMesh
    rest: DeviceMesh
    alike: int = 1
    together: dist.ProcessGroup | None = None


def meshes_of(world: World, shards: int, alike: int, device: torch.device) -> Meshes:
    """The ranks as groups of ``alike`` neighbours that compute each layer together, and those as larger ones of
    ``shards`` groups, each of which holds the model once. All processes call this.

    Raises:
        UsageError: the processes do not make whole groups.
    """
    if world.size % alike:
        raise UsageError(
            f"{world.size} processes do not make whole groups of {alike} that compute each layer together"
            if world.size > 1
            else f"this is one process, and {alike} are to compute each layer together",
            hint=f"Start {alike} processes or a multiple of it, under torchrun, or set parallel.tensor=1.",
        )
    rest = mesh_of(world, shards * alike, device)
    if alike == 1:
        return Meshes(rest, rest)
    groups = world.size // (shards * alike)
    with world.explained("a new group of processes"):
        mesh = init_device_mesh(device.type, (groups, shards, alike), mesh_dim_names=("replicate", "shard", "tensor"))
    layers = mesh["shard"] if groups == 1 else mesh["replicate", "shard"]
    return Meshes(layers, rest, alike, mesh.get_group("tensor"))


def shard(
    module: nn.Module,
    mesh: DeviceMesh,
    whole: Set[nn.Parameter] = frozenset(),
    arithmetic: torch.dtype | None = None,
    alike: int = 1,
) -> None:
    """Shards the parameters of ``module``, in place, that are not sharded yet. They are put together for its forward
    and its backward pass; those of the outermost module that is sharded, from the one to the end of the other.

    Args:
        module: on the device, the same in all ranks.
        mesh: as of :func:`mesh_of`.
        whole: parameters that stay as they are, on each rank.
        arithmetic: the dtype in which they are put together, where it is another one than theirs. Gradients are summed
            in theirs.
        alike: how many of the processes find each gradient.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=arithmetic, reduce_dtype=arithmetic and torch.float32, cast_forward_inputs=False
    )
    fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=set(whole))
    # Whoever divides the loss does so by what all ranks count: gradients are added up, and not averaged.
    sharded = cast(FSDPModule, module)
    sharded.set_gradient_divide_factor(float(alike))
    sharded.set_force_sum_reduction_for_comms(True)


def reshard(module: nn.Module) -> None:
    """Lets go of what a forward pass that no backward pass followed has put together."""
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor, in every rank that has some of them. All of these call this."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, values: Tensor) -> Tensor:
    """What this rank has of ``values``, which has all rows, where it has those of ``tensor``; on the same device. A
    scalar is everybody's."""
    if not isinstance(tensor, DTensor) or not values.dim():
        return values.to(tensor.device)
    own = values[rows_of(tensor, len(values))].to(tensor.device).contiguous()
    return DTensor.from_local(
        own, tensor.device_mesh, tensor.placements, run_check=False, shape=values.shape, stride=values.stride()
    )


def rows_of(tensor: DTensor, rows: int) -> slice:
    """Which of so many rows this rank has, sharded as ``tensor`` is: as many as the others, or the last ones fewer."""
    mesh = tensor.device_mesh
    each = -(-rows // mesh.size(mesh.ndim - 1))
    first = min(rows, mesh.get_local_rank(mesh.ndim - 1) * each)
    return slice(first, min(rows, first + each))


def total_norm(tensors: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """The norm of all of the tensors together, the same in all ranks."""
    norm = torch.nn.utils.get_total_norm(tensors, norm_type=order)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip(parameters: Sequence[nn.Parameter], most: float, norm: Tensor) -> None:
    """Scales the gradients of ``parameters``, in place, so that their ``norm`` is ``most`` where it is more."""
    meshes = defaultdict[DeviceMesh | None, list[nn.Parameter]](list)  # one operator takes those of one
    for parameter in parameters:
        meshes[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    for members in meshes.values():
        torch.nn.utils.clip_grads_with_norm_(members, most, norm)


def of_matrices(tensors: Sequence[Tensor], function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """What ``function`` makes of matrices, each of which it needs whole.

    Sharded matrices are shared out among the ranks: each gets its own whole, from all, and gives back their rows. Of
    stacks of matrices, each rank has some whole already. Groups of ranks that hold the same do the same.

    Args:
        tensors: of one shape [*, m, n], all sharded alike or none.
        function: from a batch [k, m, n], k > 0, to one of the same shape and dtype.

    Returns:
        One for each of ``tensors``, sharded as that is.
    """
    if not isinstance(tensors[0], DTensor):
        return _batched(list(tensors), function)
    sharded = [cast(DTensor, tensor) for tensor in tensors]
    local = [tensor.to_local() for tensor in sharded]
    made = _batched(local, function) if sharded[0].dim() > 2 else _shared_out(sharded[0], local, function)
    return [
        DTensor.from_local(
            each, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        for each, like in zip(made, sharded, strict=True)
    ]


def _batched(tensors: list[Tensor], function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    stacked = torch.stack(tensors)
    if not stacked.numel():
        return tensors
    return list(function(stacked.flatten(0, -3)).view(stacked.shape))


def _shared_out(example: DTensor, local: list[Tensor], function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The rows that are here of what ``function`` makes of matrices that are sharded as ``example`` is, of which
    ``local`` are the rows that are here."""
    mesh, (rows, columns) = example.device_mesh, example.shape
    group, ranks, rank = mesh.get_group(mesh.ndim - 1), mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    each, rounds = -(-rows // ranks), -(-len(local) // ranks)
    # Matrix i is that of rank i % ranks. To it goes [rounds, each, columns], padded.
    sent = local[0].new_zeros(rounds * ranks, each, columns)
    for place, piece in zip(sent, local, strict=False):
        place[: len(piece)] = piece
    got = _exchanged(sent.view(rounds, ranks, each, columns).transpose(0, 1), group)
    own = got.transpose(0, 1).reshape(rounds, ranks * each, columns)
    count = len(range(rank, len(local), ranks))
    if count:
        own[:count, :rows] = function(own[:count, :rows])
    found = _exchanged(own.view(rounds, ranks, each, columns).transpose(0, 1), group)
    whole = found.transpose(0, 1).reshape(rounds * ranks, each, columns)
    return [matrix[: len(piece)].contiguous() for matrix, piece in zip(whole, local, strict=False)]


def _exchanged(pieces: Tensor, group: dist.ProcessGroup) -> Tensor:
    """From each rank of the group, in their order, the piece of its ``pieces`` that is this rank's."""
    pieces = pieces.contiguous()
    got = torch.empty_like(pieces)
    dist.all_to_all_single(got, pieces, group=group)
    return got
