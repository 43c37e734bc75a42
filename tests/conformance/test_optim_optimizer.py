"""The law of ``optim.optimizer``, for every registered policy."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import nn

from penstock.core.processor import Answer
from penstock.testing.enrolled import enrolled
from penstock.testing.optim_optimizer import SHAPES, check_limit, check_optimizer
from penstock.train.optim.adamw import AdamW
from penstock.train.optim.muon import Muon

POLICIES = enrolled("optim.optimizer")


class Both(torch.optim.Optimizer):
    """PyTorch's Muon for the layers' matrices beside its AdamW for the rest."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        matrices = {name: p for name, p in parameters.items() if name.startswith("layers.") and p.dim() == 2}
        rest = [p for name, p in parameters.items() if name not in matrices]
        self.parts = (
            torch.optim.Muon(matrices.values(), 0.02, 0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, 0.003, (0.9, 0.95), weight_decay=0.0, fused=True),
        )

    def step(self) -> None:
        for part in self.parts:
            part.step()


def decaying_matrices(parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """PyTorch's AdamW, where matrices decay."""
    groups = [{"params": [p], "weight_decay": 0.2 if p.dim() > 1 else 0.0} for p in parameters.values()]
    return torch.optim.AdamW(groups, 0.01, (0.8, 0.9), 1e-6, fused=True)


# The limiting case of each optimizer: its options, the known optimizer, and the parameters that both are given.
LIMITS = {
    "adamw": (AdamW(lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2), decaying_matrices, SHAPES),
    # One matrix of a shape: what is batched may round differently.
    "muon": (
        Muon(lr=0.02, momentum=0.9, weight_decay=0.1, adam_lr=0.003),
        Both,
        {
            name: shape
            for name, shape in SHAPES.items()
            if name not in ("layers.1.attention.qkv.weight", "layers.0.mlp.gate_up")
        },
    ),
}


@pytest.mark.parametrize("name", POLICIES)
def test_the_law_of_optimizers_holds(name: str) -> None:
    check_optimizer(POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_the_limiting_case_is_the_known_optimizer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that multiplies fastest in bf16, which PyTorch's Muon takes every device for."""
    monkeypatch.setattr("penstock.train.optim.muon.fast_dtype", lambda device: Answer(torch.bfloat16, ""))
    options, known, shapes = LIMITS[name]
    assert options.policy_name == name
    check_limit(options.build, known, shapes)
