"""The part of the laws of ``pipeline.schedule``, ``pipeline.route`` and ``pipeline.transform`` that trains: updates of
the trainer on several processes are those of one device.

The reference shares no code with the runtime or the trainer: one Decoder, one microbatch after another along its path,
PyTorch's own backward. Without a flush it keeps every version of every stage's weights, and takes for each forward the
one that the schedule's list of tasks says.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from penstock.core.config import build
from penstock.core.randomness import torch_generator
from penstock.data.loader import Batch
from penstock.models.attention import PackedRows
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.ops.cross_entropy import IGNORE, linear_cross_entropy
from penstock.parallel.world import World
from penstock.pipeline.ir.refusal import RefusalError
from penstock.pipeline.ir.schedule import Kind, Schedule, WeightRule
from penstock.pipeline.routes.contract import PipelineRoute
from penstock.pipeline.run.stages import Stage, parameter_names
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.pipeline.transforms.contract import PipelineTransform
from penstock.testing.ranks import agreed
from penstock.train.config import TrainConfig
from penstock.train.loop import Trainer
from penstock.train.optim.contract import Optimizer
from penstock.train.pipeline.pipeline import PROFILED, Pipeline

#: Relative to the largest weight: sums of fp64 numbers in another order, over some updates. The trainer reports losses
#: in float32.
TOLERANCE, LOSS_TOLERANCE = 1e-9, 1e-6
LENGTH, VOCABULARY = 8, 24
CPU = torch.device("cpu")
#: Updates that are compared; of what is planned anew from the first ones, so many that the new schedule runs too.
UPDATES, PLANNED = 2, 2 * PROFILED + 1

_SHAPE = {"vocabulary": VOCABULARY, "hidden": 8, "heads": 2, "kv_heads": 1, "head_dim": 4, "ffn": 12, "init_std": 0.3}

#: A policy of one of the three contracts.
Trained = PipelineSchedule | PipelineRoute | PipelineTransform


def batch(step: int, rows: int) -> Batch:
    """The same in all processes: of two documents a row, some targets not counted."""
    shape = 2, rows, LENGTH
    tokens, targets = torch.randint(VOCABULARY, shape, generator=torch_generator(0, "testing/batch", step))
    documents = (torch.arange(LENGTH) > 2).long().expand(rows, LENGTH)
    return Batch(tokens, targets.masked_fill(targets % 5 == 0, IGNORE), documents)


def options(devices: int, microbatches: int, layers: int, pipeline: Mapping[str, Any], **changes: Any) -> TrainConfig:
    """A configuration of the trainer for batches of :func:`batch`, one row a microbatch."""
    tokens = microbatches * LENGTH
    tree = {
        "model": {**_SHAPE, "layers": layers, "context": LENGTH, "tied": True, "qk_norm": True},
        "batch": {"tokens": tokens, "micro_tokens": LENGTH, "stages": [{"length": LENGTH}]},
        "optim": {"name": "adamw", "lr": 0.01},
        "parallel": {"pipeline": devices},
        "pipeline": dict(pipeline),
        "precision": "fp32",
        "compile": False,
        "device": "cpu",
        "steps": 100,
    }
    for section, values in changes.items():
        tree[section] = (
            {**cast(dict[str, Any], tree.get(section, {})), **values} if isinstance(values, dict) else values
        )
    return build(TrainConfig, tree, "a test")


def check_trains(policies: Mapping[str, Trained], size: int) -> None:
    """Asserts that each of ``policies`` trains on ``size`` processes, forked for it, as one device does. Those that
    refuse that many are let off."""
    with tempfile.TemporaryDirectory() as folder:

        def work(world: World) -> dict[str, list[str]]:
            torch.set_num_threads(1)
            return {name: check_policy(policy, world, Path(folder)) for name, policy in policies.items()}

        verdicts = agreed(size, work)
    faults = sorted({f"{name}: {fault}" for found in verdicts for name, told in found.items() for fault in told})
    assert not faults, "\n".join(faults)


def check_policy(policy: Trained, world: World, folder: Path, device: torch.device = CPU) -> list[str]:
    """What differs from one device in some updates of the trainer that follow ``policy``."""
    sections: list[dict[str, Any]]
    match policy:
        case PipelineTransform():
            sections = [{"schedule": name, "transforms": [policy.describe()]} for name in ("1f1b", "zb_h1")]
        case PipelineRoute():
            sections = [{"route": policy.describe()}]
        case _:
            sections = [{"schedule": policy.describe()}]
    return [fault for section in sections for fault in _check(section, world, folder, device)]


def _check(section: dict[str, Any], world: World, folder: Path, device: torch.device) -> list[str]:
    devices, microbatches = world.size, 2 * world.size
    probe = options(devices, microbatches, 1, section, clip=None).pipeline
    policy = probe.route or probe.schedule
    try:
        schedule = policy.build(devices, microbatches)
    except RefusalError as refusal:
        if refusal.devices != devices:
            return []
        microbatches = refusal.microbatches
        schedule = policy.build(devices, microbatches)
    changes: dict[str, Any] = {}
    if schedule.weights is WeightRule.STASH:
        changes = {"clip": None, "model": {"tied": False}}
    planned = any("times" in type(part).model_fields for part in (policy, *probe.transforms))
    config = options(devices, microbatches, schedule.stages, section, **changes)
    return check_config(config, world, folder, PLANNED if planned else UPDATES, device=device)


def check_config(
    config: TrainConfig,
    world: World,
    folder: Path,
    updates: int = UPDATES,
    *,
    compiled: bool = False,
    device: torch.device = CPU,
) -> list[str]:
    """What differs from one device in some updates of the trainer with ``config``, its stages ``compiled`` or not; all
    processes call this, each with its ``device`` of one kind.

    The model of the configuration is drawn in fp64.
    """
    shape, rows = config.model, config.batch.tokens // LENGTH
    assert shape is not None
    pipeline = Pipeline(config, shape, folder, world)
    pipeline.part.initialize(0).double().to(device)
    trainer = Trainer(config, pipeline.part, None, None, folder, world, pipeline)  # type: ignore[arg-type]
    if compiled:
        pipeline.compile()
        pipeline.rehearse(*next(trainer.updater.microbatches(batch(0, rows), LENGTH)))
        world.barrier()
    mine = rows // pipeline.grid.pipelines
    own = slice(pipeline.grid.pipeline * mine, (pipeline.grid.pipeline + 1) * mine)
    reports = []
    for step in range(updates):
        given = batch(step, rows).each(operator.itemgetter(own))
        reports.append(trainer.update(given, LENGTH, 1.0))
    trainer.updater.settle()
    expected = alone(config, pipeline.schedule, pipeline.stages, updates, device)
    faults = []
    for step, (report, (loss, norm)) in enumerate(zip(reports, expected.reports, strict=True)):
        for key, ours, theirs in (("loss", report["loss"].item(), loss), ("gradient's norm", _norm(report), norm)):
            if not abs(ours - theirs) <= LOSS_TOLERANCE * abs(theirs):
                faults.append(f"the {key} of update {step} is {ours}, not {theirs}")
    for name, master in trainer.weights.masters.items():
        wanted = pipeline.part.own(name, expected.weights[name])
        error = ((master.detach() - wanted).abs().max() / wanted.abs().max()).item()
        if not error <= TOLERANCE:
            faults.append(f"{name} is off by {error:.1e}")
    return faults


def _norm(report: Mapping[str, Tensor]) -> float:
    return report["grad_norm"].item()


@dataclasses.dataclass(frozen=True)
class Alone:
    """Loss and norm of the gradient of each update on one device, and the weights after the last."""

    reports: list[tuple[float, float]]
    weights: dict[str, Tensor]


def alone(
    config: TrainConfig, schedule: Schedule, stages: Sequence[Stage], updates: int, device: torch.device = CPU
) -> Alone:
    """The updates of one device, microbatches along the paths of ``schedule`` through ``stages``."""
    assert config.model is not None
    # Several pipelines have the same paths, each for its rows.
    paths = [schedule.path(row % schedule.microbatches) for row in range(config.batch.tokens // LENGTH)]
    layers = tuple(tuple(layer for stage in path for layer in stages[stage].layers) for path in paths)
    if schedule.weights is WeightRule.FLUSH:
        return _flushed(config.model, config.optim, config.clip, layers, updates, device)
    model, trained = _drawn(config.model, device)
    optimizer = config.optim.build(trained)
    batches = [batch(step, len(layers)).to(device) for step in range(updates)]
    reports = [_delayed_updates(model, given, schedule, stages, layers, optimizer) for given in batches]
    return Alone(reports, {name: p.detach() for name, p in trained.items()})


def _drawn(shape: DecoderConfig, device: torch.device) -> tuple[Decoder, dict[str, torch.nn.Parameter]]:
    """A model in fp64, and its parameters that are trained."""
    model = Decoder(shape).initialize(0).double().to(device)
    return model, {name: p for name, p in model.named_parameters() if p.requires_grad}


@functools.cache
def _flushed(
    shape: DecoderConfig,
    optim: Optimizer,
    clip: float | None,
    layers: tuple[tuple[int, ...], ...],
    updates: int,
    device: torch.device,
) -> Alone:
    """The same where an update follows each batch, whose rows pass ``layers``: it does not depend on who has which."""
    model, trained = _drawn(shape, device)
    optimizer = optim.build(trained)
    batches = [batch(step, len(layers)).to(device) for step in range(updates)]
    reports = [_one_update(model, given, layers, optimizer, clip) for given in batches]
    return Alone(reports, {name: p.detach() for name, p in trained.items()})


def loss_along(model: Decoder, given: Batch, row: int, layers: Sequence[int]) -> Tensor:
    """The summed loss of one row along its path."""
    context = PackedRows.of(given.documents[row : row + 1])
    x, _, _ = model.through([model.layers[layer] for layer in layers], given.tokens[row : row + 1], context)
    return linear_cross_entropy(model.norm(x).flatten(0, 1), model.head.weight, given.targets[row])


def _one_update(
    model: Decoder,
    given: Batch,
    layers: Sequence[Sequence[int]],
    optimizer: torch.optim.Optimizer,
    clip: float | None,
) -> tuple[float, float]:
    total, predicted = 0.0, int((given.targets != IGNORE).sum())
    for row, path in enumerate(layers):
        loss = loss_along(model, given, row, path) / predicted
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if clip is not None:
        torch.nn.utils.clip_grads_with_norm_(list(model.parameters()), clip, norm)
    optimizer.step()
    optimizer.zero_grad()
    return total, norm.item()


def _delayed_updates(
    model: Decoder,
    given: Batch,
    schedule: Schedule,
    stages: Sequence[Stage],
    layers: Sequence[Sequence[int]],
    optimizer: torch.optim.Optimizer,
) -> tuple[float, float]:
    """An update after each microbatch, whose gradient is that at the versions of weights that its forwards saw."""
    named = parameter_names(model.config, stages)
    stage_of = {name: stage for stage, names in enumerate(named) for name in names}
    parameters = dict(model.named_parameters())
    seen = {}
    for order in schedule.orders:
        updates = 0
        for task in order:
            if task.kind is Kind.F:
                seen[task.stage, task.microbatch] = updates
            updates += task.kind is Kind.B
    history = [{name: p.detach().clone() for name, p in parameters.items()}]
    losses, squares = [], []
    for row, path in enumerate(layers):
        _put(parameters, {name: history[seen[stage_of[name], row]][name] for name in parameters})
        predicted = max(1, int((given.targets[row] != IGNORE).sum()))
        loss = loss_along(model, given, row, path) / predicted
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        squares.append(sum(p.grad.square().sum().item() for p in parameters.values() if p.grad is not None))
        _put(parameters, history[-1])
        optimizer.step()
        optimizer.zero_grad()
        history.append({name: p.detach().clone() for name, p in parameters.items()})
    return sum(losses) / len(losses), (sum(squares) / len(squares)) ** 0.5


@torch.no_grad()
def _put(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
