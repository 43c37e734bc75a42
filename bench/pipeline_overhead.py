"""Time of a pipeline's task where stages do nothing: the runtime's own, beside that of torch.distributed.pipelining.

Two processes over gloo, 1F1B, on the CPU, whatever the device.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import nn

from penstock.core.bench import Bench
from penstock.parallel.world import World
from penstock.pipeline.run.grid import Grid
from penstock.policy import create
from penstock.testing.pipeline_peer import ours, theirs
from penstock.testing.workers import Workers, serve

DEVICES, MICROBATCHES, WIDTH, STEPS = 2, 32, 8, 20


class Scale(nn.Module):
    """A stage of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` times it."""
        return x * self.weight


def subjects(world: World):
    """In a worker: seconds of one task, by subject."""
    torch.set_num_threads(1)
    grid = Grid(world, DEVICES)
    schedule = create("pipeline.schedule", "1f1b").build(DEVICES, MICROBATCHES)
    modules = {world.rank: Scale()}
    inputs = torch.ones(MICROBATCHES, 1, WIDTH)

    def loss(out, target):
        return (out - target).sum()

    steps = {
        "penstock": ours(schedule, grid, modules, loss, inputs, inputs, (1, WIDTH), torch.float32),
        "torch": theirs("Schedule1F1B", grid, modules, DEVICES, loss, inputs, inputs),
    }

    def answer(order: str) -> float:
        world.barrier()
        began = time.perf_counter()
        for _ in range(STEPS):
            steps[order]()
        return (time.perf_counter() - began) / STEPS / (2 * MICROBATCHES)

    return answer


def main(bench: Bench) -> None:
    """Measures in processes of its own."""
    with Workers(Path(__file__), DEVICES) as workers:
        bench.compare(
            subject="penstock",
            peer="torch.distributed.pipelining, Schedule1F1B",
            setting=f"{DEVICES} processes over gloo, {MICROBATCHES} microbatches, stages of one number",
            metric="time of a task",
            unit="us",
            better="lower",
            run=lambda: 1e6 * max(workers.ask("penstock")),
            peer_run=lambda: 1e6 * max(workers.ask("torch")),
            repetitions=9,
        )


if __name__ == "__main__":
    serve(subjects)
