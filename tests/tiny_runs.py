"""Training runs that are small enough for tests: a corpus, and configurations."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from penstock.core.config import build
from penstock.data.corpora.folder import Folder
from penstock.data.store import TokenStore
from penstock.data.tokenizer import train_tokenizer
from penstock.train.config import TrainConfig

VOCABULARY = 320
MODEL = {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn": 48, "context": 64}


def make_corpus(folder: Path) -> Path:
    """Some sixty text files, of one character to a few thousand."""
    folder.mkdir(parents=True)
    text = inspect.getsource(argparse)
    start, number = 0, 0
    while start < 60_000:
        end = start + 1 + (number * 397) % 2111
        (folder / f"{number:03}.txt").write_text(text[start:end])
        start, number = end, number + 1
    return folder


def make_store(folder: Path) -> Path:
    """A token store of that corpus."""
    corpus = Folder(path=make_corpus(folder / "corpus"))
    tokenizer = train_tokenizer((document.text for document in corpus.documents()), VOCABULARY)
    return TokenStore.build(corpus, tokenizer, folder / "store", held_out=0.2, workers=1).folder


def tree(store: Path, **changes: Any) -> dict[str, Any]:
    """A configuration as it would stand in a file: 40 steps of 4 rows, a checkpoint every 10."""
    model = {**MODEL, "vocabulary": VOCABULARY, "init_std": 0.08}
    return {
        "model": model,
        "data": {"store": str(store)},
        "batch": {"tokens": 128, "stages": [{"length": 32}]},
        "optim": {"name": "adamw", "lr": 3e-3},
        "schedule": {"name": "linear", "warmup_steps": 4},
        "precision": "fp32",
        "compile": False,
        "device": "cpu",
        "steps": 40,
        "checkpoint_steps": 10,
        **changes,
    }


def config(store: Path, **changes: Any) -> TrainConfig:
    """The same, validated."""
    return build(TrainConfig, tree(store, **changes))


def write_config(path: Path, store: Path, **changes: Any) -> Path:
    """The same as a TOML file."""
    lines = [f"{key} = {_toml(value)}" for key, value in tree(store, **changes).items() if value is not None]
    path.write_text("\n".join(lines) + "\n")
    return path


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights, optimizer state, averages and masters."""
    found = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        found |= {f"{_group(path)}/{name}": tensor for name, tensor in load_file(path).items()}
    return found


def _group(path: Path) -> str:
    """What a file holds, or a process's part of it."""
    return re.sub(r"-\d+-of-\d+$", "", path.stem)


def assert_same_bits(one: Path, other: Path) -> None:
    """Two checkpoints hold the same bits and were reached by the same steps."""
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("optimizer/") for name in ours)
    different = [name for name in ours if not torch.equal(_bits(ours[name]), _bits(theirs[name]))]
    assert not different
    position, expected = (json.loads((c / "trainer" / "state.json").read_text())["position"] for c in (one, other))
    assert position | {"seconds": 0} == expected | {"seconds": 0}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)
