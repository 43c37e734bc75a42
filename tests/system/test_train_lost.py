"""A process of a pipeline is lost: one error, which names it, whichever it is and however it went."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from penstock.core.errors import PenstockError
from penstock.train import checkpoint
from programs import ENVIRONMENT, Program, run_penstock
from tiny_runs import make_store, write_config

BATCH = {"tokens": 128, "micro_tokens": 32, "stages": [{"length": 32}]}
SIZE, STEPS = 3, 2


@pytest.fixture(scope="module")
def configured(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    model = {"hidden": 32, "layers": 3, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn": 48, "context": 64}
    return write_config(
        folder / "config.toml",
        make_store(folder),
        model={**model, "vocabulary": 320},
        batch=BATCH,
        steps=STEPS + 4,
        checkpoint_steps=1,
        parallel={"pipeline": SIZE},
        pipeline={"schedule": "1f1b", "timeout": 3},
    )


def watching(*arguments: str) -> None:
    """``penstock`` in a process that looks more often whether the others are there."""
    from penstock.parallel import watch

    watch.BEAT, watch.GRACE = 0.5, 2.0
    run_penstock(*arguments)


def losing(how: str, where: str, *arguments: str) -> None:
    """``penstock`` in a process that is lost: in the update after ``STEPS``, in an exchange before it with all others,
    or in the middle of its part of the pipeline."""
    from penstock.pipeline.run.transfers import Transfers
    from penstock.train.loop import Trainer

    owner = {"update": Trainer, "agreement": Trainer, "pipeline": Transfers}[where]
    name = {"update": "update", "agreement": "_agree", "pipeline": "take"}[where]
    true, calls = getattr(owner, name), {"update": STEPS + 1, "agreement": STEPS, "pipeline": 4 * STEPS + 2}[where]

    def fails(*given):
        nonlocal calls
        calls -= 1
        if calls == 0:
            if how == "raise":
                raise PenstockError("the disk is full", hint="Make room.")
            if how == "defect":
                raise KeyError("a defect")
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])
        return true(*given)

    setattr(owner, name, fails)
    watching(*arguments)


def started(configured: Path, run: Path, lost: int, how: str, where: str) -> list[Program]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": str(SIZE), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    arguments = ("train", str(configured), "--out", str(run))
    programs = []
    for rank in range(SIZE):
        own = ENVIRONMENT | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        work = (losing, how, where) if rank == lost else (watching,)
        programs.append(Program(*work, *arguments, environment=own))
    return programs


@pytest.mark.parametrize(
    ("lost", "how", "where"),
    [
        (0, "kill", "pipeline"),
        (2, "kill", "agreement"),
        (1, "raise", "update"),
        (2, "stop", "pipeline"),
        pytest.param(1, "kill", "update", marks=pytest.mark.slow),
        pytest.param(0, "raise", "agreement", marks=pytest.mark.slow),
        pytest.param(2, "raise", "pipeline", marks=pytest.mark.slow),
        pytest.param(1, "defect", "update", marks=pytest.mark.slow),
        pytest.param(0, "stop", "update", marks=pytest.mark.slow),
    ],
)
def test_one_error_names_the_process_that_was_lost(configured, tmp_path, lost, how, where):
    """All end, of all that they print together there is one error, and the checkpoints before it stay."""
    programs = started(configured, tmp_path / "run", lost, how, where)
    others = [rank for rank in range(SIZE) if rank != lost]
    assert [programs[rank].wait(60) for rank in others] == [1, 1]
    if how == "stop":
        programs[lost].kill()
    assert programs[lost].wait(60) == (1 if how in ("raise", "defect") else -signal.SIGKILL)
    printed = [program.errors() for program in programs]
    together = "".join(printed)
    telling = lost if how in ("raise", "defect") else min(others)
    assert [rank for rank, text in enumerate(printed) if text] == [telling], printed
    wanted = {
        "kill": f"error: rank {lost} has ended without a word\n",
        "stop": f"error: rank {lost} does not answer",
        "raise": f"error: rank {lost}: the disk is full\nMake room.\n",
        "defect": f"rank {lost} has failed:\nTraceback (most recent call last):\n",
    }[how]
    assert together.startswith(wanted)
    if how != "defect":
        assert "Traceback" not in together
        assert len(together.splitlines()) == 2
    found, faults = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert faults == []
    assert found is not None
    assert checkpoint.step_of(found) in (STEPS - 1, STEPS)
