"""A run that torchrun starts, divided among two processes in some way, beside the same run in one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from penstock.core.metrics import read_metrics
from penstock.train.run import Run
from programs import ENVIRONMENT
from tiny_runs import config, write_config

TORCHRUN = str(Path(sys.executable).with_name("torchrun"))


def check_command_line(folder: Path, store: Path, divided: str, alone: str, **changes: Any) -> None:
    """Two processes compile layers that are ``divided``; three make no pairs; and one goes on with ``alone``, as a run
    of one process would have."""
    changes |= {"schedule": {"name": "constant", "warmup_steps": 0}}
    path = write_config(folder / "config.toml", store, steps=6, **changes)

    def started(size: int, *arguments: object) -> subprocess.CompletedProcess[str]:
        line = [TORCHRUN, "--standalone", "--nproc-per-node", str(size), "-m", "penstock", "train"]
        return subprocess.run(
            [*line, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT, timeout=400, check=False
        )

    done = started(2, path, "--set", divided, "--set", "compile=true", "--out", folder / "run")
    assert done.returncode == 0, done.stderr
    assert "after 6 steps" in done.stdout
    assert "without torch.compile" not in done.stdout
    refused = started(3, "--resume", folder / "run", "--set", "steps=9")
    assert refused.returncode != 0
    assert refused.stderr.count("error: 3 processes do not make whole groups of 2") == 1
    done = started(1, "--resume", folder / "run", "--set", "steps=9", "--set", alone)
    assert done.returncode == 0, done.stderr
    whole = Run.create(config(store, steps=9, **changes), folder / "alone")
    assert whole.trainer.train()
    losses = [[each["loss"] for each in read_metrics(run / "metrics.jsonl")] for run in (folder / "run", whole.folder)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
