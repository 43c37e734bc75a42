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
