"""A process for each GPU, which checks the schedules that it is told, over NCCL; started by test_pipeline_cuda.py."""

from __future__ import annotations

import traceback

import torch

from penstock.testing.enrolled import enrolled
from penstock.testing.pipeline_runtime import check_runtime
from penstock.testing.workers import serve


def orders(world):
    """The function from the name of a schedule to what is wrong with it, if anything."""
    device = torch.device(f"cuda:{world.local_rank}")
    torch.cuda.set_device(device)
    policies = enrolled("pipeline.schedule")

    def check(name: str) -> str:
        try:
            check_runtime(policies[name], world, 5, device=device)
        except AssertionError:
            return traceback.format_exc(limit=-2)
        return ""

    return check


if __name__ == "__main__":
    serve(orders)
