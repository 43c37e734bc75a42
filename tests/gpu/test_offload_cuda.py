"""Activations that wait in pinned host memory, on one GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from penstock.parallel.world import World
from penstock.pipeline.ir.schedule import Schedule
from penstock.pipeline.run.grid import Grid
from penstock.pipeline.run.runtime import Runtime
from penstock.policy import create

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MICROBATCHES, ROWS, WIDTH, LAYERS = 6, 4096, 1024, 4


def run(schedule: Schedule) -> tuple[list[Tensor], int]:
    """The gradients of some layers, and the most memory that was allocated."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(LAYERS)]
    model = nn.Sequential(*layers).to(device, torch.bfloat16)
    inputs = torch.randn(MICROBATCHES, ROWS, WIDTH, device=device, dtype=torch.bfloat16)
    parameters = dict(model.named_parameters())
    runtime = Runtime(schedule, Grid(World(), 1), parameters, [[*parameters]], dtype=torch.bfloat16, device=device)

    def forward(stage: int, microbatch: int, x: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return None, model(inputs[microbatch]).float().square().mean()

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    runtime.step(forward, [(ROWS, WIDTH)] * MICROBATCHES)
    return [parameter.grad for parameter in parameters.values()], torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("name", ["gpipe", "zb_h1"])
def test_the_same_bits_in_less_memory(name):
    plain = create("pipeline.schedule", name).build(1, MICROBATCHES)
    moved = dataclasses.replace(plain, offloaded=frozenset((0, microbatch) for microbatch in range(MICROBATCHES)))
    run(plain)  # so that libraries have their workspaces
    (expected, most), (found, least) = run(plain), run(moved)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    if name == "gpipe":  # which holds all microbatches at once
        assert least < most
