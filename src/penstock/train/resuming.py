"""Going on with a run: what a checkpoint keeps beside the weights, and how a trainer takes it up again."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from penstock import __version__
from penstock.core.errors import CheckpointError
from penstock.models import hub
from penstock.parallel.shard import like
from penstock.train import checkpoint, folders
from penstock.train.checkpoint import TrainerState
from penstock.train.config import TrainConfig
from penstock.train.guard import Guard
from penstock.train.report import Position
from penstock.train.update import Updater


def resume_command(folder: Path) -> str:
    """What to type to go on with the run in ``folder``."""
    return f"penstock train --resume {shlex.quote(str(folder))}"


def groups_of(updater: Updater) -> dict[str, Mapping[str, Tensor]]:
    """The tensors of a checkpoint beside the model's, as far as they are here."""
    tensors: dict[str, Mapping[str, Tensor]] = {
        "optimizer": checkpoint.optimizer_tensors(updater.optimizer, updater.names)
    }
    if updater.averages:
        tensors["average"] = dict(zip(updater.weights.masters, updater.averages, strict=True))
    if updater.weights.rounded or updater.adds:
        tensors["masters"] = dict(updater.weights.masters)
    if updater.model.config.moe is not None:
        tensors["loads"] = updater.loads.tensors()
    return tensors


def description_of(config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint says of the run."""
    return {"config": config.model_dump(mode="json"), "version": __version__}


def state_of(updater: Updater, config: TrainConfig) -> TrainerState:
    """What a checkpoint keeps beside the weights. All processes call this; of a pipeline's, the leading one gets it; of
    a model in shards, each gets those of its own."""
    tensors = groups_of(updater)
    if updater.pipeline:
        tensors = {group: updater.pipeline.collect(parts) for group, parts in tensors.items()}
    return TrainerState(dataclasses.asdict(updater.position), description_of(config), tensors)


def restore(updater: Updater, folder: Path, state: TrainerState, config: TrainConfig) -> None:
    """Puts the weights of the verified checkpoint ``folder`` and its ``state`` into ``updater``.

    Raises:
        ModelError: it is of another model.
        CheckpointError: it was written with another kind of optimizer, or lacks state that is needed now.
    """
    _require_same(updater, folder, state, config)
    parts = updater.pipeline or updater.shards
    own = parts.own if parts else dict
    if updater.pipeline:
        updater.pipeline.part.take(hub.load(folder))
    elif not updater.adds and not updater.shards:
        # Else the base is there, and what is added to it among the masters; or the shards were filled from the folder.
        folders.import_state(updater.model, folder)
    checkpoint.restore_optimizer(updater.optimizer, updater.names, own(state.tensors["optimizer"]))
    if "masters" in state.tensors:
        updater.weights.load(own(state.tensors["masters"]))
    if updater.averages:
        averages = own(state.tensors["average"])
        for average, name in zip(updater.averages, updater.weights.masters, strict=True):
            average.copy_(like(average, averages[name]))
    updater.loads.restore(state.tensors.get("loads", {}))
    updater.position = Position(**{**state.position, "guard": Guard(**state.position.get("guard", {}))})


def _require_same(updater: Updater, folder: Path, state: TrainerState, config: TrainConfig) -> None:
    former, now = state.description["config"]["optim"]["name"], config.optim.policy_name
    before, tuner = state.description["config"].get("tuner"), config.tuner.describe()
    if before not in (None, tuner):
        raise CheckpointError(
            f"{folder} was written with the tuner {before}, and this configuration has {tuner}",
            hint="Leave tuner as it was, or start a new run from this model with start_from.",
        )
    needed = {"average": bool(updater.averages), "masters": updater.weights.rounded or updater.adds}
    lacking = [group for group, wanted in needed.items() if wanted and group not in state.tensors]
    if former == now and not lacking:
        return
    what = f"was written with {former}" if former != now else f"has no {' and no '.join(lacking)}"
    raise CheckpointError(
        f"{folder} {what}, so it cannot continue with this configuration",
        hint="Leave optim.name, precision and average as they were, or start a new run from this model "
        "with start_from.",
    )
