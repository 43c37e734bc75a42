"""The processes of a run, forked from one that has imported everything already.

As a script: trains the configuration given as JSON with several processes, and prints a JSON object for each of them:
its exit code, what it raised, and a hash of the weights that it ended with.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first optimizer would import it, which takes most of a second
import torch.distributed

from penstock.core.errors import PenstockError
from penstock.parallel.world import World
from penstock.testing.ranks import ranks
from penstock.train.config import TrainConfig
from penstock.train.run import Run


def weights(run: Run) -> str:
    """A hash of every bit of a run's weights."""
    digest = hashlib.sha256()
    for master in run.trainer.masters:
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


if __name__ == "__main__":
    config_path, folder, size, failing = sys.argv[1:]
    config = TrainConfig.model_validate_json(Path(config_path).read_text())
    work = trained(config, Path(folder), int(failing) if failing != "none" else None)
    for result in ranks(int(size), work):
        print(json.dumps(result))
