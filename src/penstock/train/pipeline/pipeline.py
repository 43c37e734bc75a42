"""Training on a pipeline: what the loop does differently where no process holds the whole model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from penstock.core.devices import synchronize
from penstock.core.errors import ConfigError
from penstock.core.files import write_atomic, write_json
from penstock.data.loader import Batch
from penstock.models.attention import CausalRows, PackedRows
from penstock.models.blank import assembled, without_weights
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.parallel.world import World
from penstock.pipeline.draw.trace import trace_events
from penstock.pipeline.ir.schedule import Kind, WeightRule
from penstock.pipeline.run.compiled import compile_layers, compiled, use_eager
from penstock.pipeline.run.grid import Grid
from penstock.pipeline.run.offload import HostLink
from penstock.pipeline.run.profile import Activations, gathered, measured
from penstock.pipeline.run.replicas import holders
from penstock.pipeline.run.runtime import Runtime, Step, require_supported
from penstock.pipeline.run.stages import Part, Stage, parameter_names, stages_of
from penstock.pipeline.run.vocabulary import Shard, shard_rows
from penstock.pipeline.simulate.simulator import Link, Simulation, simulate
from penstock.train.config import TrainConfig
from penstock.train.pipeline import recovery
from penstock.train.pipeline.arrangement import Arrangement
from penstock.train.pipeline.cutting import ranges_of
from penstock.train.pipeline.post_validated import PostValidated
from penstock.train.pipeline.profiling import alone, described, halves_of, pieces_here, times_of
from penstock.train.pipeline.recovery import Left
from penstock.train.precision import Weights

#: The update of a session that is profiled: the ones before it warm up. Where the schedule is then made anew from what
#: was measured, so is the update that comes as long after it.
PROFILED = 3

#: The microbatches of an update, and the attention contexts of their forward passes.
Micros = Sequence[tuple[Batch, CausalRows | PackedRows]]

COSTS, TRACE = "pipeline.json", "pipeline-trace.json"


class Pipeline:
    """This process's place in the pipelines of a run, and the exchange of what one process alone does not have.

    Parameters and all that belongs to them are known by the names that they have in the whole Decoder; of those that
    several processes hold, the one with the lowest rank is the owner, who counts them in norms and sends them to be
    saved; of a sharded matrix each process owns its rows. So neither results nor checkpoints depend on the layout.

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
        self._arrangement = Arrangement.of(config)
        self._plans = self._arrangement.plans
        self._arrangement.check_post_validation(sparse=shape.moe is not None)
        self._require_elementwise()
        self.grid = Grid(world, config.parallel.pipeline, config.pipeline.timeout)
        self.schedule = self._arrangement.build(self.grid.devices, self._microbatches())
        self.stages = stages_of(self.schedule, ranges_of(config, shape, self.schedule))
        named = parameter_names(shape, self.stages, sharded=bool(self.schedule.barriers))
        self._trained = [[name for name, trained in stage.items() if trained] for stage in named]
        require_supported(self.schedule, self._trained, self.grid)
        held = [s for s, devices in enumerate(self.schedule.placement) if self.grid.device in devices]
        rows = shard_rows(shape.vocabulary, self.grid.devices)[self.grid.device] if self.schedule.barriers else None
        self.part = Part(shape, [self.stages[stage] for stage in held], rows)
        first = {name: ranks[0] for name, ranks in holders(self.schedule, named, self.grid).items()}
        here = [name for name, _ in self.part.named_parameters()]  # of which rows of a vocabulary are nobody else's
        self._owned = {name for name in here if first.get(name, world.rank) == world.rank}
        # Those that no device before this one of the same pipeline has.
        device, devices = self.grid.device, self.grid.devices
        self._counted = {name for name in here if first.get(name, device) % devices == device}
        grid = self.grid
        self._twins = [tuple(grid.rank(d, k) for k in range(grid.pipelines)) for d in range(grid.devices)]
        for ranks in self._twins if grid.pipelines > 1 else ():
            grid.group("twins", ranks)
        with without_weights():
            self.parameters = Decoder(shape).parameter_count()
        self._norm = torch.zeros(())
        self._hidden_loss: Callable[[Decoder, Tensor, Batch], Tensor] = config.objective.hidden_loss
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

    @property
    def flushes(self) -> bool:
        """Whether weights are updated once a batch, and not by each stage after each microbatch."""
        return self.schedule.weights is WeightRule.FLUSH

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
            weights=dict(self.part.named_parameters()),
        )

    def compile(self) -> None:
        """Compiles the layers of this part and the loss, from their next passes on; see :meth:`rehearse`."""
        compile_layers(self.part)
        self._hidden_loss = compiled(self._config.objective.hidden_loss)

    def use_eager(self) -> None:
        """Undoes :meth:`compile`."""
        use_eager(self.part)
        self._hidden_loss = self._config.objective.hidden_loss

    def rehearse(self, batch: Batch, context: CausalRows | PackedRows) -> None:
        """The passes of this process's stages on one microbatch, without the others: whole and split ones, so that what
        a run needs is compiled now. Leaves no gradients."""
        hidden = torch.randn(*batch.tokens.shape, self.part.config.hidden, dtype=self._dtype, device=self._device)
        one = torch.ones((), device=self._device)
        kinds = {(task.stage, task.kind) for task in self.schedule.orders[self.grid.device]}
        for stage in sorted({stage for stage, kind in kinds if kind is Kind.F}):
            begins, ends = self.stages[stage].begins and not self.schedule.barriers, self.stages[stage].ends

            def run(x: Tensor, stage: int = stage, begins: bool = begins, ends: bool = ends) -> list[Tensor]:
                made = self._run_stage(stage, batch, context, None if begins else x, one, ends)
                return [root for root in made if root is not None]

            for split in (False, True):
                if (stage, Kind.I if split else Kind.B) in kinds or (split and self._measures_halves):
                    x = hidden.detach().requires_grad_()
                    alone(run, x, self._weights.arithmetic(self._device), split=split)
        self.part.zero_grad()

    @property
    def _measures_halves(self) -> bool:
        """Whether I and W are measured by themselves: not where layers are computed again in the backward pass."""
        return not self._config.activation_checkpointing

    # One update.

    def predicted(self, batch: Batch) -> Tensor:
        """By how much the loss of an update is divided, over all pipelines, of which ``batch`` is this one's part:
        float32, on the device."""
        return self.over_pipelines(self._config.objective.count(batch).float()).to(self._device)

    def over_pipelines(self, number: Tensor) -> Tensor:
        """The sum of a number over all pipelines, on the CPU. Devices of one pipeline do not wait for each other."""
        total = number.detach().cpu().clone()
        if self.grid.pipelines > 1:
            ranks = self._twins[self.grid.device]
            with self.grid.explained(ranks[0] if ranks[0] != self._world.rank else ranks[1], "its part of a batch"):
                dist.all_reduce(total, group=self.grid.group("twins", ranks))
        return total

    def backward(self, micros: Micros, predicted: Tensor, confirm: Callable[[], bool] | None = None) -> Tensor:
        """Leaves the gradients over all pipelines in the masters; returns this process's share of the loss.

        Args:
            micros: the microbatches of this pipeline, the same in all of its processes.
            predicted: tokens that the update predicts, over all pipelines.
            confirm: see :meth:`~penstock.pipeline.run.runtime.Runtime.step`.
        """
        return self._run(micros, [predicted] * len(micros), confirm=confirm)

    def post_validated(self, optimizer: torch.optim.Optimizer) -> PostValidated:
        """The updates of this process by ``optimizer``, for which no device waits. All processes at the same time."""
        counted = {name: master for name, master in self._weights.masters.items() if name in self._counted}
        return PostValidated(self.grid, optimizer, counted, self._config.clip)

    def stream(self, micros: Micros, step: Callable[[], None]) -> dict[str, Tensor]:
        """Updates the weights of each stage after each microbatch, by the mean over the tokens that this one predicts.

        Args:
            micros: the microbatches.
            step: makes an update of this process's weights by the gradients in the masters, and clears them.

        Returns:
            The ``loss``, the mean over the microbatches; ``grad_norm`` and ``grad_l1`` of their gradients, in the root
            of the mean square and in the mean.
        """
        square, absolute = (torch.zeros((), device=self._device) for _ in range(2))

        def update(_: int) -> None:
            norms = self._norms_of_owned()
            square.add_(norms[0].square())
            absolute.add_(norms[1])
            step()

        predicted = [self._config.objective.count(batch).clamp(min=1) for batch, _ in micros]
        loss = self._run(micros, predicted, update)
        self._world.sum_([loss, square, absolute])
        count = len(micros)
        return {"loss": loss / count, "grad_norm": (square / count).sqrt(), "grad_l1": absolute / count}

    def _run(
        self,
        micros: Micros,
        predicted: Sequence[Tensor],
        update: Callable[[int], None] | None = None,
        confirm: Callable[[], bool] | None = None,
    ) -> Tensor:
        """A step of the runtime, profiled if it is time for that; returns this process's share of the loss."""
        self._updates += 1
        recorded: dict[int, Activations] = {}
        record = self._updates == PROFILED or (self._plans and self._updates == 2 * PROFILED)

        def forward(stage: int, microbatch: int, x: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
            batch, context = micros[microbatch]
            last = stage == self.schedule.path(microbatch)[-1]
            with contextlib.ExitStack() as stack:
                stack.enter_context(self._weights.arithmetic(self._device))
                if record and stage not in recorded:
                    recorded[stage] = stack.enter_context(Activations(self.part.parameters()))
                return self._run_stage(stage, batch, context, x, predicted[microbatch], last)

        shapes = [(*batch.tokens.shape, self.part.config.hidden) for batch, _ in micros]
        pieces: list[list[float]] = []
        if record:
            if confirm is not None:
                confirm()  # now, as passes that are measured leave no gradients
            pieces = self._pieces(*micros[0])
            synchronize(self._device)
            self._world.barrier()  # so that the clocks of all devices start together
        shard = self._shard(micros, predicted[0])
        collect = self._weights.collect_gradients
        step = self._runtime.step(forward, shapes, collect, update=update, shard=shard, confirm=confirm)
        self._weights.collect_gradients()  # of a sharded vocabulary, whose passes are no stage's
        self._note_norm()
        if record:
            kept = {stage: found.bytes for stage, found in recorded.items()}
            real = self._profiled(step, kept, shapes[0], pieces)
            if self._world.leads:
                self._write(real, pieces)
            if self._plans and self._updates == PROFILED:
                self._plan(real)
        return step.loss.float()

    def _note_norm(self) -> None:
        """Keeps the norm of this update's gradient of the layers here, by which lost neighbours are made anew."""
        route = self._config.pipeline.route
        if route is not None and route.recovers:
            masters = self._weights.masters.items()
            own = [m.grad for name, m in masters if name.startswith("layers.") and m.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(own)

    def leave(
        self, position: dict[str, Any], description: dict[str, Any], groups: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        """Where lost stages can be made anew, writes what this process holds; see
        :mod:`penstock.train.pipeline.recovery`."""
        route = self._config.pipeline.route
        whole = all(bool(p.isfinite().all()) for p in self.part.parameters())
        if route is None or not route.recovers or not whole:
            return
        left = Left(
            stages=tuple((own.start, own.stop) for own in self._ranges),
            stage=self.grid.device,
            norm=float(self._norm),
            position=position,
            description=description,
        )
        recovery.leave(self._folder, self._world.rank, left, {"model": dict(self.part.named_parameters()), **groups})

    def _run_stage(
        self,
        stage: int,
        batch: Batch,
        context: CausalRows | PackedRows,
        x: Tensor | None,
        predicted: Tensor,
        last: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        objective = self._config.objective
        layers = self.stages[stage].layers
        hidden, balance = self.part.run(layers, batch.tokens if x is None else x, context, last=last)
        losses: list[Tensor] = []
        if balance is not None:
            losses.append(objective.balance_loss(self.part.config, balance))
        predicts = last and not self.schedule.barriers
        if predicts:
            losses.append(self._hidden_loss(self.part, hidden, batch))
        return None if predicts else hidden, torch.stack(losses).sum() / predicted if losses else None

    def _shard(self, micros: Micros, predicted: Tensor) -> Shard | None:
        """This process's rows of the vocabulary for an update, where it is sharded."""
        if self.part.rows is None:
            return None

        def given(microbatch: int) -> tuple[Tensor, Tensor]:
            batch, _ = micros[microbatch]
            return batch.tokens, batch.targets

        embedding, head = self.part.embedding.weight, self.part.head.weight
        return Shard(self.schedule.barriers, self.part.rows, embedding, head, given, 1 / predicted)

    def norms(self) -> dict[str, Tensor]:
        """The norms of the whole gradient, 2 and 1, of which each parameter is counted by its owner."""
        norm, absolute = self._norms_of_owned()
        square = norm.square()
        self._world.sum_([square, absolute])
        return {"grad_norm": square.sqrt(), "grad_l1": absolute}

    def _norms_of_owned(self) -> tuple[Tensor, Tensor]:
        owned = [m.grad for name, m in self._weights.masters.items() if name in self._owned and m.grad is not None]
        norm, absolute = (torch.nn.utils.get_total_norm(owned, norm_type=order) for order in (2.0, 1.0))
        dtype = next(iter(self._weights.masters.values())).dtype  # also where this process owns nothing
        return norm.to(self._device, dtype), absolute.to(self._device, dtype)

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
        parts = {name: [tensor] for name, tensor in owned.items()}
        for rank in range(1, self._world.size):
            with self.grid.explained(rank, "its part of a checkpoint"):
                size = torch.zeros(1, dtype=torch.int64)
                dist.recv(size, rank)
                data = torch.empty(int(size), dtype=torch.uint8)
                dist.recv(data, rank)
            for name, tensor in safetensors.torch.load(data.numpy().tobytes()).items():
                parts.setdefault(name, []).append(tensor)
        # Several processes own rows of a sharded matrix, in order of their ranks; of a scalar beside it, each has one.
        return {name: torch.cat(found) if found[0].dim() else found[0] for name, found in parts.items()}

    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of the whole model's ``tensors``, named as in :meth:`collect`, belongs to parameters that are here."""
        named = {name: name.split("/")[0] for name in tensors}
        return {
            name: self.part.own(named[name], tensor)
            for name, tensor in tensors.items()
            if named[name] in self._weights.masters
        }

    def whole(self) -> Decoder | None:
        """The whole model in the leading process, on the CPU; None in the others. All processes call this."""
        weights = self.collect(dict(self.part.named_parameters()))
        if not self._world.leads:
            return None
        return assembled(self.part, weights)

    # What the first steps took.

    @property
    def _ranges(self) -> list[range]:
        return [stage.layers for stage in self.stages]

    def _pieces(self, batch: Batch, context: CausalRows | PackedRows) -> list[list[float]]:
        """What each piece of the model takes by itself, the same in all processes; nothing where that is not known."""
        if not self._measures_halves:
            return []
        here = pieces_here(self.part, batch, context, self._hidden_loss, lambda: self._weights.arithmetic(self._device))
        numbers = range(self.part.config.layers + 2)
        flat = self._world.largest(*(seconds for number in numbers for seconds in here.get(number, [0.0] * 3)))
        return [flat[3 * number : 3 * number + 3] for number in numbers]

    def _profiled(
        self, step: Step, activations: Mapping[int, int], message: Sequence[int], pieces: list[list[float]]
    ) -> Simulation:
        """What an update took that all processes have just made; the same in all of them."""
        stages = range(self.schedule.stages)
        activation = self._world.largest(*(float(activations.get(stage, 0)) for stage in stages))
        with without_weights():
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
            halves=halves_of(self._ranges, pieces) if pieces else None,
        )

    def _plan(self, real: Simulation) -> None:
        """Makes the schedule anew from what was measured; what is where does not change with it."""
        self._arrangement = self._arrangement.planned(times_of(real, self._ranges, [], []))
        schedule = self._arrangement.build(self.grid.devices, self.schedule.microbatches)
        if (schedule.placement, schedule.barriers) != (self.schedule.placement, self.schedule.barriers):
            return
        self.schedule = schedule
        self.attach(self._weights, self._device)

    def _write(self, real: Simulation, pieces: list[list[float]]) -> None:
        """Writes the profile and the timeline of an update, measured and simulated."""
        element = torch.empty((), dtype=self._dtype).element_size()
        layers = self.part.config.layers
        singles = [Stage(range(0), True, False), *(Stage(range(n, n + 1), False, False) for n in range(layers))]
        with without_weights():
            parts = [Part(self.part.config, [stage]) for stage in (*singles, Stage(range(0), False, True))]
        weights = [float(element * part.parameter_count()) for part in parts]
        profile = {
            "schedule": self._arrangement.policy.describe(),
            "transforms": [transform.describe() for transform in self._arrangement.transforms],
            **described(real, self._ranges, times_of(real, self._ranges, pieces, weights)),
        }
        write_json(self._folder / COSTS, profile)
        title = f"{self._arrangement.policy.policy_name}, measured"
        trace = trace_events(real, title)
        simulated = simulate(self.schedule, real.costs)
        trace["traceEvents"] += trace_events(simulated, title.replace("measured", "simulated"), 1)["traceEvents"]
        write_atomic(self._folder / TRACE, json.dumps(trace))
