"""The processes of a run, forked from one that has imported everything already."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first optimizer would import it, which takes most of a second
import torch.distributed

from penstock.core.errors import PenstockError
from penstock.parallel.world import World
from penstock.train.config import TrainConfig
from penstock.train.run import Run


def weights(run: Run) -> str:
    """A hash of every bit of a run's weights."""
    digest = hashlib.sha256()
    for master in run.trainer.weights.masters.values():
        digest.update(master.detach().numpy().tobytes())
    return digest.hexdigest()


def trained(config: TrainConfig, folder: Path, failing: int | None) -> Callable[[World], Any]:
    """Trains to the end; the process of the rank ``failing`` raises at its fourth update."""

    def work(world: World) -> list[Any]:
        torch.set_num_threads(1)
        run = Run.create(config, folder, world)
        if world.rank == failing:
            update = run.trainer.update

            def fails(*arguments: Any) -> Any:
                if run.trainer.position.step == 3:
                    raise PenstockError("this process has failed")
                return update(*arguments)

            run.trainer.update = fails  # type: ignore[method-assign]
        complete = run.trainer.train()
        summary = run.finish()
        return [complete, weights(run), summary["bits_per_byte"], run.trainer.position.seconds]

    return work
