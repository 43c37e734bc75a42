"""Model folders that are small enough for tests, and damage to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder

SHAPE = DecoderConfig(vocabulary=31, hidden=16, layers=2, heads=4, kv_heads=2, head_dim=4, ffn=20, context=32)


def tiny(**changes: Any) -> Decoder:
    return Decoder(DecoderConfig.model_validate(SHAPE.model_dump() | changes)).initialize(0)


def same(one: Decoder, other: Decoder) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrites a JSON file."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrites the tensors of an unsharded folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
