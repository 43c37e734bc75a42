"""Training in shards: updates of the trainer on several processes are those of one, with each optimizer.

The reference is the trainer on one process, whose updates other laws hold against plain PyTorch; it knows nothing of
shards. Sizes are such that ranks have unequal numbers of rows, and some have none.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from penstock.core.config import build
from penstock.models import hub
from penstock.models.decoder import Decoder
from penstock.parallel.shard import whole
from penstock.parallel.world import World
from penstock.testing.pipeline_training import LENGTH, VOCABULARY, batch
from penstock.testing.ranks import agreed
from penstock.train.config import TrainConfig
from penstock.train.loop import Trainer
from penstock.train.optim.contract import Optimizer
from penstock.train.shards.shards import Shards

#: Sums of fp32 numbers in another order, over some updates: of losses, and of weights relative to the largest.
LOSS_TOLERANCE, TOLERANCE = 1e-5, 1e-4
UPDATES, ROWS = 3, 8
CPU = torch.device("cpu")

_SHAPE = {"vocabulary": VOCABULARY + 1, "hidden": 8, "heads": 2, "kv_heads": 1, "head_dim": 4, "ffn": 10, "layers": 2}

#: What is trained, and how: what differs from a dense model all of whose weights are.
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"average": "ema", "rates": {"embedding.*": 0.5}},
    "sparse": {"model": {"moe": {"experts": 3, "ffn": 6, "router": {"name": "softmax", "top_k": 2}}, "tied": False}},
    "lora": {"tuner": {"name": "lora", "rank": 3}, "average": "naswa"},
    "partly frozen": {"tuner": {"name": "full", "frozen": ["embedding.*", "layers.0.*"]}, "average": "naswa"},
}

#: The same of models whose layers two processes can divide. Of four heads, one has those of other keys than the other.
DIVIDED: dict[str, dict[str, Any]] = {
    "divided": {"model": {"heads": 4, "kv_heads": 2}, "average": "ema", "rates": {"embedding.*": 0.5}},
    "divided, biased and partly frozen": {
        "model": {
            "kv_heads": 2,
            "tied": False,
            "qk_norm": False,
            "qkv_bias": True,
            "output_bias": True,
            "mlp_bias": True,
        },
        "tuner": {"name": "full", "frozen": ["embedding.*", "layers.0.mlp.*", "*attention_norm.*"]},
        "activation_checkpointing": True,
    },
}


@dataclasses.dataclass(frozen=True)
class Course:
    """What some updates came to: of each the loss and the gradient's norms, and the weights and averages at the end."""

    reports: list[list[float]]
    weights: dict[str, Tensor]


def options(kind: str, optimizer: Optimizer, start: Path, shard: int, tensor: int = 1, **changes: Any) -> TrainConfig:
    """A configuration of the trainer for batches of :func:`~penstock.testing.pipeline_training.batch`: two microbatches
    of a row each for each of four processes, or as many for fewer; it begins with the model in ``start``."""
    tree: dict[str, Any] = {
        "start_from": str(start),
        "batch": {"tokens": ROWS * LENGTH, "micro_tokens": LENGTH, "stages": [{"length": LENGTH}]},
        "optim": optimizer.describe(),
        "parallel": {"shard": shard, "tensor": tensor},
        "precision": "fp32",
        "compile": False,
        "device": "cpu",
        "steps": 100,
        **{key: value for key, value in (KINDS | DIVIDED)[kind].items() if key != "model"},
        **changes,
    }
    return build(TrainConfig, tree, "a test")


def precise(optimizer: Optimizer) -> Optimizer:
    """The optimizer, with a high rate, all in fp32; and where it divides by the size of a gradient, not by next to
    nothing, which would make much of the order in which that was summed."""
    changes = {"lr": 0.02, "precision": "fp32", "eps": 1e-3}
    return optimizer.model_copy(update={key: changes[key] for key in type(optimizer).model_fields if key in changes})


def write_model(folder: Path, kind: str) -> Path:
    """The model folder that a kind begins with."""
    shape = {
        **_SHAPE,
        "context": LENGTH,
        "tied": True,
        "qk_norm": True,
        "init_std": 0.3,
        **(KINDS | DIVIDED)[kind].get("model", {}),
    }
    config = build(TrainConfig, {"model": shape, "steps": 1, "batch": {"stages": [{"length": LENGTH}]}}, "a test").model
    assert config is not None
    hub.save(Decoder(config).initialize(0), folder)
    return folder


def trainer_of(config: TrainConfig, folder: Path, world: World | None = None, device: torch.device = CPU) -> Trainer:
    """The trainer of ``config`` at the beginning, in shards where there are several processes."""
    world = world or World()
    shards = Shards.of(config, world, device) if world.size > 1 else None
    start = str(config.start_from)
    model = hub.blank(start) if shards else hub.load(start, dtype=torch.float32, device=device)
    config.tuner.attach(model, config.seed)
    if shards is not None:
        model = shards.fill(model, cast(Any, config.precision), start)
    return Trainer(config, model, cast(Any, None), folder, folder, world, None, shards)


def course(trainer: Trainer, updates: int = UPDATES) -> Course:
    """Some updates; each process has its rows of every batch, or those of them that compute every layer together."""
    shards, world = trainer.shards, trainer.world
    reader, readers = (shards.reader, shards.readers) if shards else (world.rank, world.size)
    mine = ROWS // readers
    own = slice(reader * mine, (reader + 1) * mine)
    made = [trainer.update(batch(step, ROWS).each(operator.itemgetter(own)), LENGTH, 1.0) for step in range(updates)]
    reports = [[each[key].item() for key in ("loss", "grad_norm", "grad_l1")] for each in made]
    complete = shards.whole if shards else lambda name, tensor: whole(tensor)
    weights = {name: complete(name, master).clone() for name, master in trainer.weights.masters.items()}
    for name, average in zip(trainer.weights.masters, trainer.updater.averages, strict=False):
        weights[f"the average of {name}"] = complete(name, average).clone()
    return Course(reports, weights)


def differences(ours: Course, theirs: Course) -> list[str]:
    """What differs between two courses."""
    faults = []
    for step, pair in enumerate(zip(ours.reports, theirs.reports, strict=True)):
        for what, one, other in zip(("loss", "norm", "norm of order 1"), *pair, strict=True):
            if not abs(one - other) <= LOSS_TOLERANCE * abs(other):
                faults.append(f"the {what} of update {step} is {one}, not {other}")
    if ours.weights.keys() != theirs.weights.keys():
        return [*faults, f"what is trained differs: {sorted(ours.weights.keys() ^ theirs.weights.keys())}"]
    for name, weight in ours.weights.items():
        wanted = theirs.weights[name]
        error = ((weight - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9)).item()
        if not error <= TOLERANCE:
            faults.append(f"{name} is off by {error:.1e}")
    return faults


def check_shards(optimizers: Mapping[str, Optimizer], folder: Path, size: int, shard: int, tensor: int = 1) -> None:
    """Asserts that each of ``optimizers`` trains models of all :data:`KINDS` on ``size`` processes, ``shard`` of which
    hold a model together, as on one; where ``tensor`` neighbours compute each layer together in the place of each of
    these, those of :data:`DIVIDED`."""
    torch.set_num_threads(1)
    kinds = KINDS if tensor == 1 else DIVIDED
    starts = {kind: write_model(folder / f"{kind} model", kind) for kind in kinds}
    cases = list(itertools.product(kinds, optimizers))

    def configured(kind: str, name: str, shard: int, tensor: int) -> TrainConfig:
        return options(kind, precise(optimizers[name]), starts[kind], shard, tensor)

    alone = {case: course(trainer_of(configured(*case, 1, 1), folder)) for case in cases}

    def work(world: World) -> list[str]:
        faults = []
        for kind, name in cases:
            found = course(trainer_of(configured(kind, name, shard, tensor), folder, world))
            faults += [f"{name}, {kind}: {fault}" for fault in differences(found, alone[kind, name])]
        return faults

    told = sorted({fault for found in agreed(size, work) for fault in found})
    assert not told, "\n".join(told)
