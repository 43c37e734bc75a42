"""Training in shards over NCCL, a process for each GPU: the updates of one device, in its part of the memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from penstock.policy import index
from penstock.testing.sharded_training import DIVIDED, KINDS
from penstock.testing.workers import Workers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.fixture(scope="module")
def workers():
    size = 4 if torch.cuda.device_count() >= 4 else 2  # of which each has as many rows of a batch
    with Workers(Path(__file__).with_name("shard_ranks.py"), size) as started:
        yield started


@pytest.mark.parametrize("name", index().names("optim.optimizer"))
@pytest.mark.parametrize("kind", KINDS)
def test_shards_train_as_one_gpu_does(workers, kind, name):
    assert set(workers.ask(f"fp32 | {kind} | {name}")) == {""}


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_low_precision_too(workers, kind, precision):
    assert set(workers.ask(f"{precision} | {kind} | adamw")) == {""}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("kind", DIVIDED)
def test_divided_layers_train_as_one_gpu_does(workers, kind, precision):
    """Two neighbours compute each layer together; of four, two such pairs hold the model together."""
    assert set(workers.ask(f"{precision}, divided | {kind} | adamw")) == {""}


def test_compiled_divided_layers_compute_the_same(workers):
    assert set(workers.ask("compiled, divided | divided | adamw", 600)) == {""}


def test_compiled_layers_compute_the_same(workers):
    assert set(workers.ask("compiled | dense | adamw", 600)) == {""}


def test_each_gpu_holds_its_part(workers):
    assert set(workers.ask("memory")) == {""}
