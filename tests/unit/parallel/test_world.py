"""What processes exchange: sums and votes."""

from __future__ import annotations

import pytest
import torch

from penstock.core.errors import PenstockError
from penstock.core.randomness import torch_generator
from penstock.parallel.world import World
from penstock.testing.ranks import agreed


def exchange(world: World) -> list[object]:
    """Tensors of all kinds, summed, and three votes."""
    draw = torch_generator(0, "exchange", world.rank)
    tensors = [
        torch.randn(3, 5, generator=draw),
        torch.randn(7, generator=draw, dtype=torch.float64).t(),
        torch.randn(4, 6, generator=draw).t(),
        torch.tensor(float(world.rank)),
        torch.arange(3, dtype=torch.bfloat16) + world.rank,
    ]
    world.sum_(tensors)
    world.sum_([])
    world.barrier()
    votes = world.largest(world.rank == 1, -world.rank, world.rank / 3)
    return [world.rank, world.size, world.leads, [tensor.double().tolist() for tensor in tensors], votes]


def test_sums_and_votes_of_three_processes():
    """The same bits in each, by shapes and dtypes of all kinds, and the values that one process computes."""
    results = agreed(3, exchange)
    assert [result[:3] for result in results] == [[0, 3, True], [1, 3, False], [2, 3, False]]
    assert results[0][3] == results[1][3] == results[2][3]
    draws = [torch_generator(0, "exchange", rank) for rank in range(3)]
    first = sum(torch.randn(3, 5, generator=draw) for draw in draws)
    second = sum(torch.randn(7, generator=draw, dtype=torch.float64) for draw in draws)
    third = sum(torch.randn(4, 6, generator=draw) for draw in draws).t()
    for got, wanted in zip(results[0][3], [first, second, third, 3.0, [3.0, 6.0, 9.0]], strict=True):
        torch.testing.assert_close(torch.tensor(got), torch.as_tensor(wanted).float(), rtol=1e-6, atol=1e-6)
    assert [result[4] for result in results] == [[1.0, 0.0, 2 / 3]] * 3


def test_a_process_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = World.join()
    assert world == World(0, 1, 0)
    assert world.leads
    tensor = torch.ones(3)
    world.sum_([tensor])
    assert tensor.tolist() == [1, 1, 1]
    assert world.largest(2.0, -1.0) == [2.0, -1.0]
    world.barrier()
    world.leave()


def test_a_group_that_cannot_be_joined(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(PenstockError, match=r"cannot join the 2 processes of the run: .*\nStart them with torchrun"):
        World.join()
