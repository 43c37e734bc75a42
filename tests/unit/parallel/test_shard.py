"""Rows of tensors on several processes, beside PyTorch's own distribution of them."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from penstock.core.errors import UsageError
from penstock.core.randomness import torch_generator
from penstock.parallel import shard
from penstock.parallel.world import World
from penstock.testing.ranks import agreed

CPU = torch.device("cpu")
#: Divided evenly among four, unevenly, and so that some have nothing.
SHAPES = [(8, 3), (5, 4), (2, 3), (3, 4, 2), (7,)]


def drawn(shape: tuple[int, ...], number: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch_generator(number, "test"), dtype=torch.float64)


def distributed(world: World, size: int, shape: tuple[int, ...], number: int = 0) -> DTensor:
    mesh = shard.mesh_of(world, size, CPU)
    placements = [*([Replicate()] if mesh.ndim > 1 else []), Shard(0)]
    return distribute_tensor(drawn(shape, number), mesh, placements)


def check_rows(world: World, size: int) -> list[str]:
    faults = []
    for shape in SHAPES:
        theirs = distributed(world, size, shape)
        ours = shard.like(theirs, drawn(shape))
        if not (torch.equal(ours.to_local(), theirs.to_local()) and torch.equal(shard.whole(ours), drawn(shape))):
            faults.append(f"rows of {shape}")
        moment = torch.zeros_like(theirs)  # an operator on both sees the same places
        if not torch.equal((moment + ours).full_tensor(), drawn(shape)):
            faults.append(f"places of {shape}")
    several = [distributed(world, size, shape, number) for number, shape in enumerate(SHAPES)]
    flat = torch.cat([drawn(shape, number).flatten() for number, shape in enumerate(SHAPES)])
    for order in (1.0, 2.0):
        torch.testing.assert_close(shard.total_norm(several, order), torch.linalg.vector_norm(flat, order))
    return faults


def inverses(batch: torch.Tensor) -> torch.Tensor:
    """Something for which every matrix must be whole."""
    assert batch.dim() == 3
    assert len(batch)
    return torch.linalg.pinv(batch).mT


def check_matrices(world: World, size: int) -> list[str]:
    faults = []
    for shape in ((8, 3), (3, 5), (3, 4, 2), (1, 3, 2)):
        for count in (1, 2, 5):
            sharded = [distributed(world, size, shape, number) for number in range(count)]
            found = [each.full_tensor() for each in shard.of_matrices(sharded, inverses)]
            wanted = shard.of_matrices([drawn(shape, number) for number in range(count)], inverses)
            alone = [torch.linalg.pinv(drawn(shape, number)).mT for number in range(count)]
            for one, other, plain in zip(found, wanted, alone, strict=True):
                if not (torch.allclose(one, plain, atol=1e-12) and torch.allclose(other, plain, atol=1e-12)):
                    faults.append(f"{count} of {shape}")
    return faults


@pytest.mark.parametrize("group", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_rows_and_whole_matrices(group):
    """On four processes, in two groups that hold tensors together, or in one."""

    def work(world: World) -> list[str]:
        torch.set_num_threads(1)
        return check_rows(world, group) + check_matrices(world, group)

    assert agreed(4, work) == [[]] * 4


def test_processes_that_make_no_whole_groups():
    with pytest.raises(UsageError, match="3 processes do not make whole groups of 2"):
        shard.mesh_of(World(0, 3, 0), 2, CPU)
