"""Heads on the model itself: tokens a second and tokens a step of each kind, trained alike, beside plain decoding.

A head of each kind is trained for python-6m, by its preset and all for as long; then the model continues files of the
standard library that neither has seen, greedily, for one, four and sixteen requests at a time. At one request also
transformers' assisted generation, for which python-1m drafts, and its prompt look-up.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from penstock.core.bench import Bench, load
from penstock.core.config import build, read_toml
from penstock.core.progress import show
from penstock.models import hub
from penstock.models.decoder import Decoder
from penstock.models.heads import folder as heads
from penstock.models.heads.contract import HeadModule
from penstock.models.heads.headed import Headed
from penstock.policy import index
from penstock.serve.build import build_engine
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.train import presets
from penstock.train.config import TrainConfig
from penstock.train.run import Run
from penstock.train.session import train_to_the_end

script = load("speculate")


def settings(kind: str) -> TrainConfig:
    """How a head of this kind is trained for the target."""
    preset = presets.path_of(f"drafter-{kind.replace('_', '-')}")
    return build(TrainConfig, {**read_toml(preset), "target": script.TARGET})


def trained(target: Decoder, kind: str, quick: bool) -> HeadModule:
    """A head of this kind for the ``target``; one that has learnt nothing where it is to be quick."""
    config = settings(kind)
    if quick:
        assert config.head is not None
        return Headed.new(target, config.head, 0).head.requires_grad_(False).eval()
    with tempfile.TemporaryDirectory() as made:
        train_to_the_end(Run.create(config, Path(made) / "run"), show)
        return heads.load(Path(made) / "run", target)


def drafting(kind: str | None) -> dict[str, Any]:
    """How an engine drafts with a head of this ``kind``: always as much as it can, but where trees are chosen by what
    steps take, for which they have to be timed."""
    if kind is None:
        return {}
    head = settings(kind).head
    assert head is not None
    timed = head.drafter == "ppd"
    return {"draft": {"name": head.drafter, "source": kind}, "controller": "measured" if timed else "fixed"}


def main(bench: Bench) -> None:
    """Trains the heads, and measures them."""
    target = hub.load(script.TARGET, device=bench.device, dtype=torch.float32).eval()
    engines: dict[str, Engine] = {}
    for kind in [None, *index().names("model.head")]:
        common = {"sequences": max(script.CROWDS), "cache_tokens": 16384}
        config = EngineConfig.model_validate({**common, **drafting(kind)})
        head = None if kind is None else trained(target, kind, bench.quick)
        engines[kind or "plain decoding"] = build_engine(target, config, draft=head)
    for crowd in script.CROWDS[: 1 if bench.quick else None]:
        script.by_crowd(bench, engines, crowd)
