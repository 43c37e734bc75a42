"""The part of the laws of ``pipeline.schedule`` and ``pipeline.transform`` that needs processes: what any number of
them compute is what one computes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from penstock.core.randomness import torch_generator
from penstock.models.attention import PackedRows
from penstock.models.config import DecoderConfig, MoEConfig
from penstock.models.decoder import Decoder
from penstock.ops.cross_entropy import linear_cross_entropy
from penstock.parallel.world import World
from penstock.pipeline.ir.refusal import RefusalError
from penstock.pipeline.ir.schedule import Schedule, WeightRule
from penstock.pipeline.partition.balanced import cut
from penstock.pipeline.run.grid import Grid
from penstock.pipeline.run.runtime import Runtime
from penstock.pipeline.run.stages import Part, Stage, parameter_names, stages_of
from penstock.pipeline.run.vocabulary import Shard, shard_rows
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.pipeline.simulate.simulator import Costs, simulate
from penstock.testing.enrolled import rebuilt
from penstock.testing.ranks import agreed

#: Relative to the largest entry of a tensor: sums of fp64 numbers in another order.
TOLERANCE = 1e-12
CPU = torch.device("cpu")
ROWS, LENGTH, VOCABULARY, BALANCE = 2, 5, 13, 0.1
#: Of the updates without a flush; large enough that another version of the weights shows.
RATE = 0.5

_SHAPE = {"vocabulary": VOCABULARY, "hidden": 8, "heads": 2, "kv_heads": 1, "head_dim": 4, "ffn": 12, "init_std": 0.3}


def dense(layers: int) -> DecoderConfig:
    """A small Decoder with all that a dense one may have; head and embedding are tied."""
    return DecoderConfig(layers=layers, **_SHAPE, tied=True, qk_norm=True, qkv_bias=True, mlp_bias=True)


def untied(layers: int) -> DecoderConfig:
    """The dense one with a head of its own."""
    return dense(layers).model_copy(update={"tied": False})


def sparse(layers: int) -> DecoderConfig:
    """A small Decoder whose layers but the first are mixtures of experts, one of them shared."""
    moe = MoEConfig(experts=3, ffn=6, shared_ffn=4, shared_gate=True, dense_layers=(0,))
    return DecoderConfig(layers=layers, **_SHAPE, moe=moe)


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device computed, and what it was given: gradients, or, without a flush, the weights after the step."""

    batches: list[tuple[Tensor, Tensor, PackedRows]]
    loss: float
    results: dict[str, Tensor]


def batch(microbatch: int, device: torch.device = CPU) -> tuple[Tensor, Tensor, PackedRows]:
    """Tokens, targets and context of a microbatch: rows of two documents each."""
    generator = torch_generator(0, "tokens", microbatch)
    tokens, targets = torch.randint(VOCABULARY, (2, ROWS, LENGTH), generator=generator).to(device)
    return tokens, targets, PackedRows.of((torch.arange(LENGTH) > 1).long().expand(ROWS, LENGTH)).to(device)


def loss_of(model: Decoder, hidden: Tensor | None, balance: Tensor | None, targets: Tensor, total: int) -> Tensor:
    """A share of the mean loss over ``total`` microbatches: of the last hidden states if there are any, of balance."""
    loss = torch.zeros((), dtype=torch.float64, device=targets.device)
    if hidden is not None:
        loss = loss + linear_cross_entropy(hidden.flatten(0, 1), model.head.weight, targets.flatten())
    return (loss if balance is None else loss + BALANCE * balance) / total


@functools.cache
def alone(config: DecoderConfig, microbatches: int, device: torch.device = CPU) -> Work:
    """The reference: the whole Decoder on one device, one microbatch after another, with PyTorch's own backward. It is
    a device of the kind that is tested, as kinds differ in the float32 angles of rotary positions."""
    model = Decoder(config).double().initialize(0).to(device)
    batches = [batch(microbatch, device) for microbatch in range(microbatches)]
    total = 0.0
    for tokens, targets, context in batches:
        hidden, balance = model(tokens, context)
        loss = loss_of(model, hidden, balance, targets, microbatches)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return Work(batches, total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


@functools.cache
def delayed(config: DecoderConfig, stages: int, microbatches: int, device: torch.device = CPU) -> Work:
    """The reference without a flush, PipeDream's rule: w(t+1) = w(t) - rate grad f(w_1(t-n+1), ..., w_n(t)), where w_s
    are the weights of stage s of n, one microbatch after another in one process."""
    model = Decoder(config).double().initialize(0).to(device)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ranges = cut(config, stages, LENGTH)
    named = parameter_names(config, [Stage(own, own.start == 0, own.stop == config.layers) for own in ranges])
    stage_of = {name: stage for stage, names in enumerate(named) for name in names}
    history = [{name: p.detach().clone() for name, p in parameters.items()}]
    batches = [batch(microbatch, device) for microbatch in range(microbatches)]
    total = 0.0
    for t, (tokens, targets, context) in enumerate(batches):
        model.zero_grad()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(history[max(0, t - (stages - 1 - stage_of[name]))][name])
        hidden, balance = model(tokens, context)
        loss = loss_of(model, hidden, balance, targets, microbatches)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
        history.append({name: w - RATE * cast(Tensor, parameters[name].grad) for name, w in history[-1].items()})
    return Work(batches, total, history[-1])


def check_on_ranks(policies: Mapping[str, PipelineSchedule], size: int, microbatches: int) -> None:
    """Asserts the law of each of ``policies`` on ``size`` processes that are forked for it, one after another.

    Those that refuse an odd number of devices are let off; an even one is to be tried as well.
    """

    def work(world: World) -> dict[str, object]:
        grid = Grid(world, world.size)
        found: dict[str, object] = {}
        for name, policy in policies.items():
            try:
                found[name] = check_runtime(policy, grid, microbatches)
            except AssertionError as error:
                found[name] = str(error)
        return found

    verdicts = agreed(size, work)
    told = sorted({(name, found) for verdict in verdicts for name, found in verdict.items() if isinstance(found, str)})
    assert not told, "\n".join(f"{name}: {found}" for name, found in told)
    skipped = [name for name, found in verdicts[0].items() if found is False]
    assert size % 2 == 1 or not skipped, f"{skipped} refuse {size} devices"


def check_runtime(policy: PipelineSchedule, grid: Grid, microbatches: int, device: torch.device = CPU) -> bool:
    """Asserts the law on the processes of ``grid``, all of which call this: loss and every gradient equal to those of
    one device in fp64, for a dense Decoder and, twice in a row, for a sparse one; and the counted peak of live
    activations equal to the simulator's. Without a flush, the weights at the end are those of :func:`delayed`.

    Where the policy refuses ``microbatches``, with those that the refusal names. Returns False, without a check, where
    it names another number of devices.
    """
    policy = rebuilt(policy)
    try:
        schedule = policy.build(grid.devices, microbatches)
    except RefusalError as refusal:
        if refusal.devices != grid.devices:
            return False
        schedule = policy.build(grid.devices, refusal.microbatches)
    check_schedule_runs(schedule, grid, device)
    return True


def check_schedule_runs(schedule: Schedule, grid: Grid, device: torch.device = CPU) -> None:
    """Asserts the law for one schedule. A tied matrix cannot be updated without a flush."""
    first = dense if schedule.weights is WeightRule.FLUSH else untied
    check_equal(schedule, grid, first(schedule.stages + 1), device)
    check_equal(schedule, grid, sparse(schedule.stages), device, steps=2)


def check_equal(
    schedule: Schedule, grid: Grid, config: DecoderConfig, device: torch.device = CPU, steps: int = 1
) -> None:
    """Asserts the law for one schedule and one Decoder, this process's part of which is on ``device``, at each of some
    steps in a row."""
    stashing = schedule.weights is WeightRule.STASH
    m = schedule.microbatches
    reference = delayed(config, schedule.stages, m, device) if stashing else alone(config, m, device)
    stages = stages_of(schedule, cut(config, schedule.stages, LENGTH))
    held = [stage for stage, devices in enumerate(schedule.placement) if grid.device in devices]
    rows = shard_rows(config.vocabulary, grid.devices)[grid.device] if schedule.barriers else None
    part = Part(config, [stages[stage] for stage in held], rows).double().to(device)
    parameters = {name: p for name, p in part.named_parameters() if p.requires_grad}
    names = [
        [name for name, trained in stage.items() if trained]
        for stage in _names(config, tuple(stages), bool(schedule.barriers))
    ]
    runtime = Runtime(schedule, grid, parameters, names, dtype=torch.float64, device=device)

    def forward(stage: int, microbatch: int, x: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        tokens, targets, context = reference.batches[microbatch]
        last = stage == schedule.path(microbatch)[-1]
        hidden, balance = part.run(stages[stage].layers, tokens if x is None else x, context, last=last)
        ends = last and not schedule.barriers
        loss = loss_of(part, hidden if ends else None, balance, targets, m)
        return None if ends else hidden, loss if loss.requires_grad else None

    def given(microbatch: int) -> tuple[Tensor, Tensor]:
        return reference.batches[microbatch][:2]

    @torch.no_grad()
    def update(stage: int) -> None:
        for name in names[stage]:
            parameters[name].sub_(RATE * cast(Tensor, parameters[name].grad))
            parameters[name].grad = None

    shapes = [(ROWS, LENGTH, config.hidden)] * m
    peak = simulate(schedule, Costs.even(schedule)).peak_activations[grid.device]
    for _ in range(steps):
        part.initialize(0).zero_grad()
        shard = Shard(schedule.barriers, rows, part.embedding.weight, part.head.weight, given, 1 / m) if rows else None
        step = runtime.step(forward, shapes, update=update if stashing else None, shard=shard)
        loss = step.loss.clone()
        grid.world.sum_([loss])
        found = {name: p.detach() if stashing else p.grad for name, p in parameters.items()}
        faults = differences({name: part.own(name, whole) for name, whole in reference.results.items()}, found)
        if not abs(loss.item() - reference.loss) <= TOLERANCE * abs(reference.loss):
            faults.append(f"the loss is {loss}, not {reference.loss}")
        if step.peak_activations != peak:
            faults.append(f"{step.peak_activations} activations were held, not the simulated {peak}")
        # All processes fail together: one that failed alone would leave the others waiting for it.
        if grid.world.largest(float(bool(faults)))[0]:
            raise AssertionError("; ".join(faults[:5]) or "another device is at fault")


@functools.cache
def _names(config: DecoderConfig, stages: tuple[Stage, ...], sharded: bool) -> list[dict[str, bool]]:
    return parameter_names(config, stages, sharded=sharded)


def differences(reference: Mapping[str, Tensor], found: Mapping[str, Tensor | None]) -> list[str]:
    """In what some results differ from the reference."""
    faults = []
    for name, ours in found.items():
        theirs = reference[name]
        if ours is None:
            faults.append(f"{name} has no gradient")
        elif not (error := ((ours - theirs).abs().max() / theirs.abs().max()).item()) <= TOLERANCE:
            faults.append(f"{name} is off by {error:.1e}")
    return faults
