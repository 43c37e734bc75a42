"""A process of a pipeline over NCCL is lost: one error, which names it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lost_ranks import check_one_error, configured

SIZE = 2
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < SIZE, reason="needs two CUDA devices"),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return configured(tmp_path_factory.mktemp("data"), SIZE, timeout=20)


@pytest.mark.parametrize(
    ("lost", "how", "where"),
    [(0, "kill", "pipeline"), (1, "kill", "update"), (1, "stop", "pipeline"), (1, "raise", "update")],
)
def test_one_error_names_the_process_that_was_lost(config, tmp_path, lost, how, where):
    check_one_error(config, tmp_path / "run", SIZE, lost, how, where, patience=150)
