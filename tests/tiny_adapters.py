"""Adapters with random numbers: in folders, in the form that PEFT writes, and as what they add to a matrix."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from penstock.core.randomness import torch_generator
from penstock.models import hub
from penstock.models.adapters.slots import matrices, read
from penstock.models.decoder import Decoder
from penstock.models.families.mapping import views_on
from penstock.ops.low_rank import LowRank


def written(
    folder: Path,
    model: Decoder,
    seed: int,
    rank: int = 3,
    wanted: Callable[[str], bool] = lambda name: True,
    size: float = 0.25,
    **config: Any,
) -> Path:
    """The ``folder`` of an adapter of ``model`` on those matrices whose names are ``wanted``, of which it changes much,
    unless it is of less ``size``. ``config`` is of its adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    family = hub.family_of(model)
    tensors = {}
    for name, (rows, columns) in matrices(model, family).items():
        if wanted(name):
            draws, module = torch_generator(seed, f"adapter/{name}"), f"base_model.model.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, columns, generator=draws) / columns**0.5
            tensors[f"{module}.lora_B.weight"] = size * torch.randn(rows, rank, generator=draws)
    save_file(tensors, folder / "adapter_model.safetensors")
    ends = sorted({name.rpartition(".")[2] for name in matrices(model, family) if wanted(name)})
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ends,
        "bias": "none",
        "fan_in_fan_out": any(".attention." in each for each in family.transposed),
    }
    (folder / "adapter_config.json").write_text(json.dumps(described | config))
    return folder


@torch.no_grad()
def merged(model: Decoder, folder: Path) -> Decoder:
    """A copy of ``model`` with the adapter of ``folder`` in its weights."""
    copied, family = copy.deepcopy(model), hub.family_of(model)
    views = views_on(copied, family)
    for name, addition in read(folder, family, model).items():
        views[name].copy_(addition.to(views[name].cpu()))
    return copied


def added(
    slots: int, rank: int, size: int, widths: tuple[int, ...], dtype: torch.dtype, draw: torch.Generator
) -> LowRank:
    """What adapters add to pieces of so many rows, with a row between two of them to which nothing is added."""
    begins = [1 + place + sum(widths[:place]) for place in range(len(widths))]
    return LowRank(
        torch.randn(len(widths), slots, rank, size, dtype=dtype, generator=draw),
        [torch.randn(slots, rank, rows, dtype=dtype, generator=draw) for rows in widths],
        [(begin, begin + rows) for begin, rows in zip(begins, widths, strict=True)],
    )


def row_by_row(out: torch.Tensor, x: torch.Tensor, room: LowRank, owners: torch.Tensor) -> torch.Tensor:
    """``out``, as float64, with what each row's own adapter adds."""
    wanted = out.to(torch.float64, copy=True)
    for row, slot in enumerate(owners.tolist()):
        for piece, (begin, end) in enumerate(room.ranges):
            if slot:
                a, b = room.a[piece, slot - 1].double(), room.b[piece][slot - 1].double()
                wanted[row, begin:end] += x[row].double() @ a.T @ b
    return wanted
