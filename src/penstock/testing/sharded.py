"""Tensors in shards on a few forked processes, for laws of what computes with them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from penstock.parallel.world import World
from penstock.testing.ranks import agreed


def on_shards(work: Callable[[Callable[[Tensor], DTensor]], list[str]], size: int = 2) -> list[str]:
    """What ``work`` complains of in each of ``size`` processes. It is given what divides the rows of a tensor among
    them."""

    def each(world: World) -> list[str]:
        torch.set_num_threads(1)
        mesh = init_device_mesh("cpu", (world.size,))
        return work(lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)]))

    return sorted({complaint for told in agreed(size, each) for complaint in told})
