"""Trains in child processes that are killed at random instants, until enough have died; then lets one finish.

Children are forked from this process, which has imported everything, so that a life costs milliseconds.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import time
from pathlib import Path

import torch
import torch._dynamo  # the first optimizer would import it, which takes most of a second

from children import born, running
from penstock.core.metrics import read_metrics
from penstock.core.progress import silent
from penstock.core.randomness import numpy_generator
from penstock.train import checkpoint
from penstock.train.config import TrainConfig
from penstock.train.run import Run
from penstock.train.session import train_to_the_end

#: Most updates of a life.
LIFE = 6


@dataclasses.dataclass(frozen=True)
class Death:
    """Whether a child was ``killed``, or had ended before that; the last update that was ``reported``; that of the
    newest whole checkpoint; and the ``faults`` of newer ones."""

    killed: bool
    reported: int
    saved: int
    faults: list[str]


def live(config: TrainConfig, folder: Path) -> None:
    """What a child does: begins or continues the run, and trains to its end."""
    torch.set_num_threads(1)
    run = Run.reopen(folder) if (folder / "run.json").exists() else Run.create(config, folder)
    train_to_the_end(run, silent)


def reported(folder: Path) -> int:
    """The last update that the run has reported."""
    records = read_metrics(folder / "metrics.jsonl")
    return records[-1]["step"] if records else 0


def kill(config: TrainConfig, folder: Path, deaths: int) -> list[Death]:
    """Kills ``deaths`` children, a third of them while they begin and the others after a few updates, at any instant
    of one; then one ends by itself.
    """
    draw = numpy_generator(0, "deaths")
    birth, told = 0.0, []
    life = functools.partial(live, config, folder)
    for number in range(deaths):
        before = reported(folder)
        child, began = born(life), time.monotonic()
        if number % 3 == 2:
            time.sleep(draw.uniform(0, birth))
        else:
            until = min(before + int(draw.integers(1, LIFE + 1)), config.steps or before)
            while reported(folder) < until and running(child):
                time.sleep(0.001)
            birth = birth or time.monotonic() - began
            time.sleep(draw.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        found, faults = checkpoint.newest(folder / "checkpoints")
        told.append(
            Death(
                killed=os.waitstatus_to_exitcode(status) == -signal.SIGKILL,
                reported=reported(folder),
                saved=0 if found is None else checkpoint.step_of(found),
                faults=[fault.what for fault in faults],
            )
        )
    _, status = os.waitpid(born(life), 0)
    assert status == 0, "the run that nobody killed has failed"
    return told
