"""Data-parallel training: several processes make the run of one."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import forked_ranks
from penstock.core.metrics import read_metrics
from penstock.testing.meeting import meeting
from penstock.testing.ranks import ranks
from penstock.train import checkpoint
from penstock.train.config import TrainConfig
from penstock.train.run import Run
from programs import ENVIRONMENT, Program, run_penstock, start
from tiny_runs import config, make_store, tensors, write_config

STAGES = {"tokens": 192, "micro_tokens": 64, "stages": [{"length": 16}, {"length": 32}]}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("data"))


def options(store: Path, **changes: Any):
    return config(store, **{"batch": STAGES, "steps": 30, "average": "ema", **changes})


@pytest.fixture(scope="module")
def alone(store, tmp_path_factory) -> Run:
    run = Run.create(options(store), tmp_path_factory.mktemp("alone") / "run")
    assert run.trainer.train()
    return run


def trained(tmp_path: Path, config: TrainConfig, size: int, failing: int | None = None) -> list[dict[str, Any]]:
    return ranks(size, forked_ranks.trained(config, tmp_path / "run", failing))


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_several_processes_make_the_run_of_one(store, alone, tmp_path, size):
    """The same loss curve to rounding, through stages, accumulation and clipping; and equal weights to the bit."""
    results = trained(tmp_path, options(store), size)
    assert [result.get("raised") for result in results] == [None] * size
    assert len({json.dumps(result["returned"][1:3]) for result in results}) == 1
    assert all(result["returned"][0] for result in results)
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path / "run", alone.folder))
    assert [record["step"] for record in ours] == [*range(1, 31)]
    for key in ("loss", "grad_norm", "grad_l1", "lr_factor", "length"):
        assert [record[key] for record in ours] == pytest.approx([record[key] for record in theirs], rel=2e-4)
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.5
    one, other = (tensors(folder / "checkpoints" / "step-00000030") for folder in (tmp_path / "run", alone.folder))
    assert one.keys() == other.keys()
    for name in one:
        if name.startswith(("model/", "average/")):
            torch.testing.assert_close(one[name], other[name], rtol=1e-2, atol=2e-3, msg=name)
    again = Run.reopen(tmp_path / "run", overrides=["steps=31"])
    assert again.trainer.position.samples == 30 * 6
    assert again.trainer.train()


def test_all_processes_follow_one_clock(store, tmp_path):
    """With a time budget, they end after the same update, whoever is slower."""
    results = trained(tmp_path, options(store, steps=None, minutes=0.01), 2)
    assert [result.get("raised") for result in results] == [None, None]
    assert len({json.dumps(result["returned"]) for result in results}) == 1
    assert results[0]["returned"][3] >= 0.6


@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_does_not_keep_the_others(store, tmp_path, failing):
    """They end, long before the hour that they wait for one that is busy, and say which one is at fault."""
    results = trained(tmp_path, options(store, checkpoint_steps=2), 2, failing)
    assert results[failing]["raised"] == ["PenstockError", "this process has failed"]
    kind, message = results[1 - failing]["raised"]
    assert kind == "LossError"
    assert message.startswith(f"rank {failing} has ended without a word\n")
    found, faults = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert (found.name, faults) == ("step-00000002", [])


def test_the_command_line_with_two_processes(store, tmp_path):
    """As torchrun starts them: one line of output, one run, and a refusal that ends both."""
    path = write_config(tmp_path / "config.toml", store, batch=STAGES, steps=6)

    def started(*arguments: object) -> list[subprocess.CompletedProcess[str]]:
        with meeting(2) as place:
            processes = [start("train", *arguments, **place, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
            return [process.completed(120) for process in processes]

    leader, other = started(path, "--out", tmp_path / "run")
    assert (leader.returncode, other.returncode) == (0, 0), leader.stderr + other.stderr
    assert "after 6 steps" in leader.stdout
    assert other.stdout == ""
    both = started("--resume", tmp_path / "run", "--set", "batch.tokens=96", "--set", "batch.micro_tokens=32")
    assert [done.returncode for done in both] == [2, 2]
    told = "".join(done.stderr for done in both)
    assert told.count("error: 2 processes cannot share 3 rows of 32 tokens evenly") == told.count("error:") == 1
    assert "Traceback" not in told


def test_processes_that_do_not_find_each_other(tmp_path, store):
    path = write_config(tmp_path / "config.toml", store)
    place = {k: v for k, v in ENVIRONMENT.items() if not k.startswith("MASTER")} | {"WORLD_SIZE": "2", "RANK": "0"}
    done = Program(run_penstock, "train", str(path), environment=place, folder=tmp_path).completed()
    assert done.returncode == 1
    assert "error: cannot join the 2 processes of the run: " in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]
