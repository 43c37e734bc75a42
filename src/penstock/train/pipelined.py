"""Training on a pipeline: what the loop does differently where no process holds the whole model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from penstock.core.devices import synchronize
from penstock.core.errors import ConfigError
from penstock.core.files import write_atomic, write_json
from penstock.data.loader import Batch
from penstock.models.attention import CausalRows, PackedRows
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.parallel.world import World
from penstock.pipeline.draw.trace import trace_events
from penstock.pipeline.ir.schedule import Kind, Schedule, WeightRule
from penstock.pipeline.partition.balanced import cut
from penstock.pipeline.run.grid import Grid
from penstock.pipeline.run.offload import HostLink
from penstock.pipeline.run.profile import Activations, gathered, measured
from penstock.pipeline.run.replicas import holders
from penstock.pipeline.run.runtime import Runtime, Step
from penstock.pipeline.run.stages import Part, parameter_names
from penstock.pipeline.simulate.simulator import Link, Simulation, simulate
from penstock.pipeline.simulate.times import Times
from penstock.policy import Policy
from penstock.train.config import TrainConfig
from penstock.train.precision import Weights
from penstock.train.saving import assembled

#: The update of a session that is profiled: the ones before it warm up. Where the schedule is then made anew from what
#: was measured, so is the update that comes as long after it.
PROFILED = 3

P = TypeVar("P", bound=Policy)

COSTS, TRACE = "pipeline.json", "pipeline-trace.json"


class Pipeline:
    """This process's place in the pipelines of a run, and the exchange of what one process alone does not have.

    Parameters and all that belongs to them are known by the names that they have in the whole Decoder; of those that
    several processes hold, the one with the lowest rank is the owner, who counts them in norms and sends them to be
    saved. So neither results nor checkpoints depend on the layout.

    Schedules and transforms that plan by times, such as zb_auto and pipeoffload, begin with those that they are given.
    Where these are the defaults, the schedule is made anew from the times of the first updates.

    Args:
        config: the run's; its ``parallel`` and ``pipeline`` sections say which.
        shape: of the model.
        folder: of the run, for the profile of its first updates.
        world: this process's place.

    Attributes:
        grid, schedule: which process does what.
        part: this process's part of the model, on the CPU, its weights not yet set.
        parameters: of the whole model.

    Raises:
        UsageError: the processes, the layers or the microbatches do not fit the schedule; see there.
        ConfigError: the trainer cannot follow the schedule or a transform of it.
    """

    def __init__(self, config: TrainConfig, shape: DecoderConfig, folder: Path, world: World) -> None:
        self._config, self._folder, self._world = config, folder, world
        self._policy, self._transforms = config.pipeline.schedule, config.pipeline.transforms
        self._plans = any(map(_plans_anew, (self._policy, *self._transforms)))
        self._require_elementwise()
        self.grid = Grid(world, config.parallel.pipeline, config.pipeline.timeout)
        self.schedule = self._arranged(self._microbatches())
        self.stages = cut(shape, self.schedule.stages, config.batch.length)
        held = [s for s, devices in enumerate(self.schedule.placement) if self.grid.device in devices]
        self.part = Part(shape, [self.stages[stage] for stage in held])
        named = parameter_names(shape, self.stages)
        self._trained = [[name for name, trained in stage.items() if trained] for stage in named]
        owners = {name: ranks[0] for name, ranks in holders(self.schedule, named, self.grid).items()}
        self._owned = {name for name, rank in owners.items() if rank == world.rank}
        with torch.device("meta"):
            self.parameters = Decoder(shape).parameter_count()
        self._updates = 0

    def _microbatches(self) -> int:
        """Of each pipeline, in an update."""
        batch = self._config.batch
        if batch.micro_tokens is None:
            raise ConfigError(
                "a pipeline works on several microbatches at a time, and batch.micro_tokens is not set",
                hint=f"Set it to a part of batch.tokens ({batch.tokens}), such as {batch.length}.",
            )
        return -(-batch.tokens // self.grid.pipelines // batch.micro_tokens)

    def _require_elementwise(self) -> None:
        average = self._config.average
        if average is not None and not average.elementwise:
            raise ConfigError(
                f"the average {average.policy_name!r} looks at all weights together, and a pipeline has them in parts",
                hint="Choose another average, such as ema, or parallel.pipeline=1.",
            )

    def _arranged(self, microbatches: int) -> Schedule:
        """The schedule after all transforms."""
        schedule = self._policy.build(self.grid.devices, microbatches)
        self._require_trainable(schedule, self._policy, "pipeline.schedule=1f1b")
        for transform in self._transforms:
            schedule = transform.apply(schedule)
            self._require_trainable(schedule, transform, f"leave {transform.policy_name} out of pipeline.transforms")
        return schedule

    def _require_trainable(self, schedule: Schedule, made_by: Policy, instead: str) -> None:
        """Refuses what the trainer cannot follow; ``instead`` says what to do without ``made_by``."""
        name = made_by.policy_name
        if schedule.weights is not WeightRule.FLUSH:
            raise ConfigError(
                f"{name} updates weights after each microbatch, and the trainer after each batch",
                hint=f"Set {instead}, which has the order of pipedream and one update a step.",
            )
        if schedule.barriers:
            raise ConfigError(
                f"{name} cuts the embedding and the head into rows, and the trainer keeps matrices whole",
                hint=f"To train, {instead}.",
            )
        splits = any(task.kind is Kind.W for order in schedule.orders for task in order)
        if splits and self._config.activation_checkpointing:
            raise ConfigError(
                f"{name} defers weight gradients, which needs the activations "
                "that activation_checkpointing does not keep",
                hint=f"Turn one of them off: activation_checkpointing=false, or {instead}.",
            )

    def attach(self, weights: Weights, device: torch.device) -> None:
        """Makes the runtime for the part, which is on ``device`` now. All processes at the same time."""
        self._weights, self._device = weights, device
        self._dtype = next(self.part.parameters()).dtype
        self._runtime = Runtime(
            self.schedule,
            self.grid,
            weights.masters,
            self._trained,
            dtype=self._dtype,
            device=device,
            staying=self.part.parameters(),
        )

    # One update.

    def backward(self, micros: Sequence[tuple[Batch, CausalRows | PackedRows]], predicted: Tensor) -> Tensor:
        """Leaves the gradients over all pipelines in the masters; returns this process's share of the loss.

        Args:
            micros: the microbatches of this pipeline, the same in all of its processes.
            predicted: tokens that the update predicts, over all pipelines.
        """
        self._updates += 1
        recorded: dict[int, Activations] = {}
        record = self._updates == PROFILED or (self._plans and self._updates == 2 * PROFILED)

        def forward(stage: int, microbatch: int, x: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
            batch, context = micros[microbatch]
            with contextlib.ExitStack() as stack:
                stack.enter_context(self._weights.arithmetic(self._device))
                if record and stage not in recorded:
                    recorded[stage] = stack.enter_context(Activations(self.part.parameters()))
                return self._run_stage(stage, batch, context, x, predicted)

        shapes = [(*batch.tokens.shape, self.part.config.hidden) for batch, _ in micros]
        if record:
            synchronize(self._device)
            self._world.barrier()  # so that the clocks of all devices start together
        step = self._runtime.step(forward, shapes, self._weights.collect_gradients)
        if record:
            real = self._profiled(step, {stage: found.bytes for stage, found in recorded.items()}, shapes[0])
            if self._world.leads:
                self._write(real)
            if self._plans and self._updates == PROFILED:
                self._plan(real)
        return step.loss.float()

    def _run_stage(
        self, stage: int, batch: Batch, context: CausalRows | PackedRows, x: Tensor | None, predicted: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        objective = self._config.objective
        hidden, balance = self.part.run(self.stages[stage], batch.tokens if x is None else x, context)
        losses: list[Tensor] = []
        if balance is not None:
            losses.append(objective.balance_loss(self.part.config, balance))
        last = stage == self.schedule.stages - 1
        if last:
            losses.append(objective.hidden_loss(self.part, hidden, batch))
        return None if last else hidden, torch.stack(losses).sum() / predicted if losses else None

    def norms(self) -> dict[str, Tensor]:
        """The norms of the whole gradient, 2 and 1, of which each parameter is counted by its owner."""
        owned = [m.grad for name, m in self._weights.masters.items() if name in self._owned and m.grad is not None]
        square = torch.nn.utils.get_total_norm(owned).to(self._device).square()
        absolute = torch.nn.utils.get_total_norm(owned, norm_type=1.0).to(self._device)
        self._world.sum_([square, absolute])
        return {"grad_norm": square.sqrt(), "grad_l1": absolute}

    # Whole and part.

    def collect(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of all processes, on the CPU of the leading one; the others get none.

        Args:
            tensors: by the name of their parameter, perhaps with ``/key`` after it. Of this process's, only those whose
                parameters it owns are sent. All processes call this, in the same order.
        """
        owned = {
            name: t.detach().cpu().contiguous() for name, t in tensors.items() if name.split("/")[0] in self._owned
        }
        if not self._world.leads:
            data = torch.frombuffer(bytearray(safetensors.torch.save(owned)), dtype=torch.uint8)
            with self.grid.explained(0, "its saving of a checkpoint"):
                dist.send(torch.tensor([data.numel()]), 0)
                dist.send(data, 0)
            return {}
        for rank in range(1, self._world.size):
            with self.grid.explained(rank, "its part of a checkpoint"):
                size = torch.zeros(1, dtype=torch.int64)
                dist.recv(size, rank)
                data = torch.empty(int(size), dtype=torch.uint8)
                dist.recv(data, rank)
            owned |= safetensors.torch.load(data.numpy().tobytes())
        return owned

    def whole(self) -> Decoder | None:
        """The whole model in the leading process, on the CPU; None in the others. All processes call this."""
        weights = self.collect(dict(self.part.named_parameters()))
        if not self._world.leads:
            return None
        return assembled(self.part, weights)

    # What the first steps took.

    def _profiled(self, step: Step, activations: Mapping[int, int], message: Sequence[int]) -> Simulation:
        """What an update took that all processes have just made; the same in all of them."""
        stages = range(self.schedule.stages)
        activation = self._world.largest(*(float(activations.get(stage, 0)) for stage in stages))
        with torch.device("meta"):
            sizes = [Part(self.part.config, [stage]).parameter_count() for stage in self.stages]
        element = torch.empty((), dtype=self._dtype).element_size()
        slowest = -self._world.largest(-HostLink(self._device).bandwidth())[0]
        return measured(
            self.schedule,
            gathered(self.grid, self.schedule, step.spans),
            activation=activation,
            weights=[float(size * element) for size in sizes],
            message=float(element * torch.Size(message).numel()),
            host=Link(bandwidth=slowest),
        )

    def _plan(self, real: Simulation) -> None:
        """Makes the schedule anew from what was measured; placements do not depend on times."""
        costs = real.costs
        times = Times(
            forward=costs.forward,
            input_grad=costs.input_grad,
            weight_grad=costs.weight_grad,
            transfer=costs.link.latency,
            host=_host_seconds(real),
        )

        def planned(policy: P) -> P:
            return policy.model_copy(update={"times": times}) if _plans_anew(policy) else policy

        self._policy, self._transforms = planned(self._policy), tuple(map(planned, self._transforms))
        schedule = self._arranged(self.schedule.microbatches)
        assert schedule.placement == self.schedule.placement
        self.schedule = schedule
        self.attach(self._weights, self._device)

    def _write(self, real: Simulation) -> None:
        """Writes the profile and the timeline of an update, measured and simulated."""
        write_json(self._folder / COSTS, self._profile(real))
        title = f"{self._policy.policy_name}, measured"
        trace = trace_events(real, title)
        simulated = simulate(self.schedule, real.costs)
        trace["traceEvents"] += trace_events(simulated, title.replace("measured", "simulated"), 1)["traceEvents"]
        write_atomic(self._folder / TRACE, json.dumps(trace))

    def _profile(self, real: Simulation) -> dict[str, Any]:
        costs, schedule = real.costs, self.schedule
        share = sum(costs.forward), sum(costs.input_grad), sum(costs.weight_grad)
        f, i, w = (f"{seconds / schedule.devices:.6g}" for seconds in share)
        return {
            "schedule": self._policy.describe(),
            "transforms": [transform.describe() for transform in self._transforms],
            "devices": schedule.devices,
            "microbatches": schedule.microbatches,
            "layers": [[stage.start, stage.stop] for stage in self.stages],
            "seconds": {"forward": costs.forward, "input_grad": costs.input_grad, "weight_grad": costs.weight_grad},
            "activation_bytes": costs.activation,
            "weight_bytes": costs.weights,
            "message_bytes": costs.message,
            "transfer_seconds": costs.link.latency,
            "host_bandwidth": costs.host.bandwidth,
            "makespan": {"measured": real.makespan, "simulated": simulate(schedule, costs).makespan},
            "cost": f"F={f},I={i},W={w},comm={costs.link.latency:.6g},host={_host_seconds(real):.6g}",
        }


def _plans_anew(policy: Policy) -> bool:
    """Whether it plans by times, and was given none."""
    field = type(policy).model_fields.get("times")
    return field is not None and getattr(policy, "times", None) == field.default


def _host_seconds(real: Simulation) -> float:
    """Of the activation of a microbatch on a p-th of the model, on its way to the host."""
    return sum(map(real.costs.host.seconds, real.costs.activation)) / real.schedule.devices
