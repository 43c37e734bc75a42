"""Pipelines of processes of which one is lost, in one way or another and at one place or another."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from penstock.core.errors import PenstockError
from penstock.testing.meeting import meeting
from penstock.train import checkpoint
from programs import ENVIRONMENT, Program, run_penstock
from tiny_runs import make_store, write_config

BATCH = {"tokens": 128, "micro_tokens": 32, "stages": [{"length": 32}]}
STEPS = 2


def configured(folder: Path, size: int, timeout: float) -> Path:
    """A configuration for ``size`` processes that wait ``timeout`` seconds for each other."""
    model = {"hidden": 32, "layers": 3, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn": 48, "context": 64}
    return write_config(
        folder / "config.toml",
        make_store(folder),
        model={**model, "vocabulary": 320},
        batch=BATCH,
        steps=STEPS + 4,
        checkpoint_steps=1,
        parallel={"pipeline": size},
        pipeline={"schedule": "1f1b", "timeout": timeout},
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


def started(
    place: dict[str, str], config: Path, run: Path, size: int, lost: int, how: str, where: str
) -> list[Program]:
    """The processes, which join at ``place``, and of which ``lost`` will be lost."""
    arguments: tuple[str, ...] = ("train", str(config), "--out", str(run))
    if how != "stop":  # which alone is noticed by its silence
        arguments += ("--set", "pipeline.timeout=100")
    programs = []
    for rank in range(size):
        own = ENVIRONMENT | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        work = (losing, how, where) if rank == lost else (watching,)
        programs.append(Program(*work, *arguments, environment=own))
    return programs


def check_one_error(config: Path, run: Path, size: int, lost: int, how: str, where: str, patience: float) -> None:
    """All end, of all that they print together there is one error, which names the one that was lost, and the
    checkpoints before it stay."""
    with meeting(size) as place:
        programs = started(place, config, run, size, lost, how, where)
        others = [rank for rank in range(size) if rank != lost]
        assert [programs[rank].wait(patience) for rank in others] == [1] * len(others)
        if how == "stop":
            programs[lost].kill()
        assert programs[lost].wait(patience) == (1 if how in ("raise", "defect") else -signal.SIGKILL)
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
    found, faults = checkpoint.newest(run / "checkpoints")
    assert faults == []
    assert found is not None
    assert checkpoint.step_of(found) in (STEPS - 1, STEPS)
