"""Recorded steps, computed again."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch

from penstock.core.devices import synchronize
from penstock.core.progress import Reporter, silent
from penstock.serve.run.record import read_steps
from penstock.serve.run.runner import Runner


@dataclasses.dataclass(frozen=True)
class Replayed:
    """What came of it.

    Attributes:
        steps: how many were computed, with ``tokens`` in all.
        seconds: that it took, one step queued behind the other.
        chosen: tokens that came out whose counterparts are in the recording; ``equal`` of them are the same.
    """

    steps: int
    tokens: int
    seconds: float
    chosen: int
    equal: int


def replay(path: Path, runner: Runner, report: Reporter = silent) -> Replayed:
    """Computes all steps of the recording at ``path``."""
    recorded = list(read_steps(path))
    outcomes = []
    with report("replaying", len(recorded), "step") as bar:
        synchronize(runner.device)
        begun = time.perf_counter()
        for step, _ in recorded:
            outcomes.append(runner.execute(step))
            bar.advance()
        synchronize(runner.device)
        seconds = time.perf_counter() - begun
    chosen = equal = 0
    for sampled, (_, tokens) in zip(outcomes, recorded, strict=True):
        if sampled is not None and tokens is not None:
            sampled.wait()
            chosen += len(tokens)
            equal += int((sampled.tokens.cpu() == torch.from_numpy(tokens)).sum())
    computed = sum(part.inputs.shape[1] for step, _ in recorded for part in step.parts)
    return Replayed(len(recorded), computed, seconds, chosen, equal)
