"""A process for each GPU, which checks the schedules, routes and transforms that it is told, over NCCL; started by
test_pipeline_cuda.py."""

from __future__ import annotations

import tempfile
import traceback
from pathlib import Path

import torch

from penstock.pipeline.run.grid import Grid
from penstock.testing.enrolled import enrolled
from penstock.testing.pipeline_runtime import check_runtime, check_schedule_runs
from penstock.testing.pipeline_schedule import variants
from penstock.testing.pipeline_training import check_config, check_policy, options
from penstock.testing.workers import serve

#: Updates that are made in another way than usual.
UPDATED = {"validated": {"schedule": "zb_h2", "post_validation": True}, "compiled": {"schedule": "zb_h1"}}


def orders(world):
    """The function from the name of a schedule or a transform to what is wrong with it, if anything."""
    device = torch.device(f"cuda:{world.local_rank}")
    torch.cuda.set_device(device)
    # One for all of them: a communicator of NCCL takes some hundred MiB, and as many milliseconds.
    grid = Grid(world, world.size, timeout=60.0)
    schedules, transforms = enrolled("pipeline.schedule"), enrolled("pipeline.transform")
    trained = {**schedules, **transforms, **enrolled("pipeline.route")}
    folder = Path(tempfile.mkdtemp())

    def check(name: str) -> str:
        try:
            if name.startswith("train "):
                return "; ".join(check_policy(trained[name.removeprefix("train ")], world, folder, device))
            if name.startswith("update "):
                _, how, clip = name.split()
                chosen = options(world.size, 4 * world.size, 8, UPDATED[how], clip=float(clip))
                compiled = how == "compiled"
                return "; ".join(check_config(chosen, world, folder, 6, device=device, compiled=compiled))
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
