"""The laws of ``pipeline.schedule`` and ``pipeline.transform`` at run time over NCCL, a process for each GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from penstock.policy import index
from penstock.testing.workers import Workers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.fixture(scope="module")
def workers():
    with Workers(Path(__file__).with_name("nccl_ranks.py"), min(4, torch.cuda.device_count())) as started:
        yield started


@pytest.mark.parametrize("name", [*index().names("pipeline.schedule"), *index().names("pipeline.transform")])
def test_several_gpus_compute_what_one_device_does(workers, name):
    assert set(workers.ask(name)) == {""}


@pytest.mark.parametrize(
    "name", [name for kind in ("schedule", "route", "transform") for name in index().names(f"pipeline.{kind}")]
)
def test_what_is_registered_trains_as_one_device_does(workers, name):
    assert set(workers.ask(f"train {name}")) == {""}


@pytest.mark.parametrize("clip", [1e-3, 3.0, 1e6])
@pytest.mark.parametrize("how", ["validated", "compiled"])
def test_updates_that_nobody_waits_for_and_compiled_ones(workers, how, clip):
    """Every norm above the limit, some, none; in fp64."""
    assert set(workers.ask(f"update {how} {clip}")) == {""}
