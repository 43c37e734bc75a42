"""Models in shards train as whole ones do, with every optimizer."""

from __future__ import annotations

import pytest

from penstock.testing.enrolled import enrolled
from penstock.testing.sharded_training import check_shards
from penstock.train.optim.contract import Optimizer


@pytest.mark.parametrize(
    ("size", "shard"),
    [
        (2, 2),
        pytest.param(4, 4, marks=pytest.mark.slow),
        pytest.param(4, 2, marks=pytest.mark.slow),
        pytest.param(8, 8, marks=pytest.mark.slow),
    ],
)
def test_shards_train_as_one_device_does(tmp_path, size, shard):
    """All on one model; and two groups that hold one each. Of eight, some have no row of most parameters."""
    check_shards(enrolled("optim.optimizer"), tmp_path, size, shard)


@pytest.mark.parametrize(
    ("size", "shard", "tensor"),
    [
        (2, 1, 2),
        pytest.param(4, 2, 2, marks=pytest.mark.slow),
        pytest.param(4, 1, 2, marks=pytest.mark.slow),
        pytest.param(8, 2, 2, marks=pytest.mark.slow),
    ],
)
def test_divided_layers_train_as_one_device_does(tmp_path, size, shard, tensor):
    """Alone; in shards; in two groups that have rows of their own; and both."""
    optimizers: dict[str, Optimizer] = enrolled("optim.optimizer")
    check_shards({name: each for name, each in optimizers.items() if each.elementwise}, tmp_path, size, shard, tensor)
