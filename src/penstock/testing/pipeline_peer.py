"""One step of a pipeline of given stage modules: by our runtime, and by that of ``torch.distributed.pipelining``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed.pipelining.schedules as torch_schedules
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from penstock.pipeline.ir.schedule import Schedule
from penstock.pipeline.run.grid import Grid
from penstock.pipeline.run.runtime import Runtime, Step

#: ``loss(output, target)`` of the last stage's output for a microbatch, a scalar.
Loss = Callable[[Tensor, Tensor], Tensor]


def ours(
    schedule: Schedule,
    grid: Grid,
    modules: Mapping[int, nn.Module],
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    message: tuple[int, ...],
    dtype: torch.dtype,
) -> Callable[[], Step]:
    """A function that makes a step.

    Args:
        schedule: what is run.
        grid: where.
        modules: this device's stages, each a function of one tensor.
        loss: of the last stage.
        inputs, targets: [m, ...], of all microbatches.
        message: the shape of what passes between stages, for a microbatch.
        dtype: of that.
    """
    parameters = {f"{stage}.{name}": p for stage, module in modules.items() for name, p in module.named_parameters()}
    runtime = Runtime(schedule, grid, parameters, [[]] * schedule.stages, dtype=dtype, device=inputs.device)
    last = schedule.stages - 1

    def forward(stage: int, microbatch: int, x: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        out = modules[stage](inputs[microbatch] if x is None else x)
        return (None, loss(out, targets[microbatch])) if stage == last else (out, None)

    return lambda: runtime.step(forward, [message] * schedule.microbatches)


def theirs(
    name: str,
    grid: Grid,
    modules: Mapping[int, nn.Module],
    stages: int,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
) -> Callable[[], None]:
    """A function that makes a step by PyTorch's schedule ``name``, such as ``Schedule1F1B``, on the same modules."""
    device = inputs.device
    held = [PipelineStage(module, stage, stages, device) for stage, module in sorted(modules.items())]
    cls: Any = getattr(torch_schedules, name)
    single = issubclass(cls, torch_schedules.PipelineScheduleSingle)
    pipeline = cls(held[0] if single else held, len(inputs), loss_fn=loss, scale_grads=False)
    flat_inputs, flat_targets = inputs.flatten(0, 1), targets.flatten(0, 1)

    def step() -> None:
        arguments = (flat_inputs,) if 0 in modules else ()
        wanted: dict[str, Any] = {"target": flat_targets, "losses": []} if stages - 1 in modules else {}
        pipeline.step(*arguments, return_outputs=False, **wanted)

    return step
