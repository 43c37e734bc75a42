"""The law of ``pipeline.schedule`` at run time: what any number of processes compute is what one computes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from penstock.core.randomness import torch_generator
from penstock.models.attention import PackedRows
from penstock.models.config import DecoderConfig, MoEConfig
from penstock.models.decoder import Decoder
from penstock.ops.cross_entropy import linear_cross_entropy
from penstock.parallel.world import World
from penstock.pipeline.contract import PipelineSchedule, RefusalError
from penstock.pipeline.grid import Grid
from penstock.pipeline.ir import Schedule, WeightRule
from penstock.pipeline.runtime import Runtime
from penstock.pipeline.simulator import Costs, simulate
from penstock.pipeline.stages import Part, cut, parameter_names
from penstock.testing.enrolled import rebuilt

#: Relative to the largest entry of a tensor: sums of fp64 numbers in another order.
TOLERANCE = 1e-12
CPU = torch.device("cpu")
ROWS, LENGTH, VOCABULARY, BALANCE = 2, 5, 13, 0.1

_SHAPE = {"vocabulary": VOCABULARY, "hidden": 8, "heads": 2, "kv_heads": 1, "head_dim": 4, "ffn": 12, "init_std": 0.3}


def dense(layers: int) -> DecoderConfig:
    """A small Decoder with all that a dense one may have; head and embedding are tied."""
    return DecoderConfig(layers=layers, **_SHAPE, tied=True, qk_norm=True, qkv_bias=True, mlp_bias=True)


def sparse(layers: int) -> DecoderConfig:
    """A small Decoder whose layers but the first are mixtures of experts, one of them shared."""
    moe = MoEConfig(experts=3, ffn=6, shared_ffn=4, shared_gate=True, dense_layers=(0,))
    return DecoderConfig(layers=layers, **_SHAPE, moe=moe)


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device computed, and what it was given."""

    batches: list[tuple[Tensor, Tensor, PackedRows]]
    loss: float
    gradients: dict[str, Tensor]


def batch(microbatch: int) -> tuple[Tensor, Tensor, PackedRows]:
    """Tokens, targets and context of a microbatch: rows of two documents each."""
    generator = torch_generator(0, "tokens", microbatch)
    tokens, targets = torch.randint(VOCABULARY, (2, ROWS, LENGTH), generator=generator)
    return tokens, targets, PackedRows.of((torch.arange(LENGTH) > 1).long().expand(ROWS, LENGTH))


def loss_of(model: Decoder, hidden: Tensor | None, balance: Tensor | None, targets: Tensor, total: int) -> Tensor:
    """A share of the mean loss over ``total`` microbatches: of the last hidden states if there are any, of balance."""
    loss = torch.zeros((), dtype=torch.float64, device=targets.device)
    if hidden is not None:
        loss = loss + linear_cross_entropy(hidden.flatten(0, 1), model.head.weight, targets.flatten())
    return (loss if balance is None else loss + BALANCE * balance) / total


@functools.cache
def alone(config: DecoderConfig, microbatches: int) -> Work:
    """The reference: the whole Decoder on one device, one microbatch after another, with PyTorch's own backward."""
    model = Decoder(config).double().initialize(0)
    batches = [batch(microbatch) for microbatch in range(microbatches)]
    total = 0.0
    for tokens, targets, context in batches:
        hidden, balance = model(tokens, context)
        loss = loss_of(model, hidden, balance, targets, microbatches)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return Work(batches, total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def check_runtime(
    policy: PipelineSchedule,
    world: World,
    microbatches: int,
    *,
    timeout: float = 60.0,
    device: torch.device = CPU,
) -> bool:
    """Asserts the law on the processes of ``world``, all of which call this: loss and every gradient equal to those of
    one device in fp64, for a dense and a sparse Decoder, twice in a row; and the counted peak of live activations equal
    to the simulator's.

    Where the policy refuses ``microbatches``, with those that the refusal names. Returns False, without a check, where
    it names another number of devices.
    """
    policy = rebuilt(policy)
    try:
        schedule = policy.build(world.size, microbatches)
    except RefusalError as refusal:
        if refusal.devices != world.size:
            return False
        schedule = policy.build(world.size, refusal.microbatches)
    check_schedule_runs(schedule, Grid(world, world.size, timeout), device)
    return True


def check_schedule_runs(schedule: Schedule, grid: Grid, device: torch.device = CPU) -> None:
    """Asserts the law for one schedule.

    Of what the runtime refuses (weights that change within a step, activations that wait on the host) the order is
    checked, with one version of the weights and all activations on the device.
    """
    schedule = dataclasses.replace(schedule, weights=WeightRule.FLUSH, offloaded=frozenset())
    for config in (dense(schedule.stages + 1), sparse(schedule.stages)):
        check_equal(schedule, grid, config, device)


def check_equal(schedule: Schedule, grid: Grid, config: DecoderConfig, device: torch.device = CPU) -> None:
    """Asserts the law for one schedule and one Decoder, this process's part of which is on ``device``."""
    reference = alone(config, schedule.microbatches)
    stages = cut(config, schedule.stages, LENGTH)
    held = [stage for stage, devices in enumerate(schedule.placement) if grid.device in devices]
    part = Part(config, [stages[stage] for stage in held]).double()
    part.initialize(0).to(device)
    parameters = {name: p for name, p in part.named_parameters() if p.requires_grad}
    names = [[name for name, trained in stage.items() if trained] for stage in parameter_names(config, stages)]
    runtime = Runtime(schedule, grid, parameters, names, dtype=torch.float64, device=device)

    def forward(stage: int, microbatch: int, x: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        tokens, targets, context = reference.batches[microbatch]
        hidden, balance = part.run(stages[stage], tokens.to(device) if x is None else x, context.to(device))
        last = stage == schedule.stages - 1
        loss = loss_of(part, hidden if last else None, balance, targets.to(device), schedule.microbatches)
        return None if last else hidden, loss if loss.requires_grad else None

    shapes = [(ROWS, LENGTH, config.hidden)] * schedule.microbatches
    peak = simulate(schedule, Costs.even(schedule)).peak_activations[grid.device]
    for _ in range(2):
        part.zero_grad()
        step = runtime.step(forward, shapes)
        loss = step.loss.clone()
        grid.world.sum_([loss])
        found = {name: parameter.grad for name, parameter in parameters.items()}
        faults = differences(reference, loss.item(), found)
        if step.peak_activations != peak:
            faults.append(f"{step.peak_activations} activations were held, not the simulated {peak}")
        # All processes fail together: one that failed alone would leave the others waiting for it.
        if grid.world.largest(float(bool(faults)))[0]:
            raise AssertionError("; ".join(faults) or "another device is at fault")


def differences(reference: Work, loss: float, gradients: Mapping[str, Tensor | None]) -> list[str]:
    """In what a loss and some of the gradients differ from the reference."""
    faults = []
    if not abs(loss - reference.loss) <= TOLERANCE * abs(reference.loss):
        faults.append(f"the loss is {loss}, not {reference.loss}")
    for name, ours in gradients.items():
        theirs = reference.gradients[name]
        if ours is None:
            faults.append(f"{name} has no gradient")
        elif not (error := ((ours.cpu() - theirs).abs().max() / theirs.abs().max()).item()) <= TOLERANCE:
            faults.append(f"the gradient of {name} is off by {error:.1e}")
    return faults
