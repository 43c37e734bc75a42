"""A process for each GPU, which checks the schedules and transforms that it is told, over NCCL; started by
test_pipeline_cuda.py."""

from __future__ import annotations

import traceback

import torch

from penstock.pipeline.run.grid import Grid
from penstock.testing.enrolled import enrolled
from penstock.testing.pipeline_runtime import check_runtime, check_schedule_runs
from penstock.testing.pipeline_schedule import variants
from penstock.testing.workers import serve


def orders(world):
    """The function from the name of a schedule or a transform to what is wrong with it, if anything."""
    device = torch.device(f"cuda:{world.local_rank}")
    torch.cuda.set_device(device)
    # One for all of them: a communicator of NCCL takes some hundred MiB, and as many milliseconds.
    grid = Grid(world, world.size, timeout=60.0)
    schedules, transforms = enrolled("pipeline.schedule"), enrolled("pipeline.transform")

    def check(name: str) -> str:
        try:
            if name in schedules:
                check_runtime(schedules[name], grid, 5, device)
                return ""
            for schedule in ("interleaved_1f1b", "zb_h1"):
                for variant in variants(transforms[name]):
                    transformed = variant.apply(schedules[schedule].build(world.size, 3 * world.size))
                    check_schedule_runs(transformed, grid, device)
        except Exception:  # to be told, not to end the process: the other checks need it
            return traceback.format_exc(limit=-2)
        return ""

    return check


if __name__ == "__main__":
    serve(orders)
