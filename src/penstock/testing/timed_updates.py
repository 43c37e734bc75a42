"""Updates of trainers between two clocks, in the processes of a benchmark (:mod:`penstock.testing.workers`)."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from penstock.core.config import build
from penstock.parallel.world import World
from penstock.train.config import TrainConfig


class TimedUpdates:
    """In a worker: trainers by order, of which one at a time is in memory. A subclass says how one is made.

    Args:
        world: the processes, each on a GPU of its own, or all on the CPU where there are fewer GPUs.
        large, tiny: the shapes of the model on GPUs and on the CPU, as in ``model`` of
            :class:`~penstock.train.config.TrainConfig`, without ``context``.
        updates: how many there are between two clocks.
        warm: how many are made before the first of them, not counted.
    """

    def __init__(self, world: World, large: dict[str, Any], tiny: dict[str, Any], updates: int, warm: int) -> None:
        self.world, self._updates, self._warm = world, updates, warm
        self.on_cuda = torch.cuda.device_count() >= world.size
        self.device = torch.device(f"cuda:{world.local_rank}" if self.on_cuda else "cpu")
        if self.on_cuda:
            torch.cuda.set_device(self.device)
        self.shape, self.length = (large, 4096) if self.on_cuda else (tiny, 32)
        self._order = ""
        self._update: Callable[[int], object] = lambda count: None

    def made(self, order: str) -> Callable[[int], object]:
        """What makes so many updates of the subject that is called ``order``."""
        raise NotImplementedError

    def __call__(self, order: str) -> dict[str, float]:
        """Answers the name of a subject with the ``seconds`` that the slowest process took for some updates of it, and
        the ``peak`` of this device's memory since it was made, in bytes (0 on the CPU)."""
        if order != self._order:
            self._update = lambda count: None
            gc.collect()
            if self.on_cuda:
                torch.cuda.empty_cache()
            self._update = self.made(order)
            self._order = order
            if self.on_cuda:
                torch.cuda.reset_peak_memory_stats()
            self._timed(self._warm)  # compiles, loads kernels, finds memory, and is profiled
        seconds = self._timed(self._updates)
        return {"seconds": seconds, "peak": float(torch.cuda.max_memory_allocated()) if self.on_cuda else 0.0}

    def config(self, tokens: int, **more: Any) -> TrainConfig:
        """That of a trainer with AdamW, and so many ``tokens`` an update in rows of their own; ``more`` keys are added
        to it."""
        tree = {
            "model": {**self.shape, "context": self.length},
            "batch": {"tokens": tokens, "micro_tokens": self.length, "stages": [{"length": self.length}]},
            "optim": {"name": "adamw", "lr": 1e-6},
            "precision": "bf16" if self.on_cuda else "fp32",
            "steps": 1000,
        }
        return build(TrainConfig, tree | more, "the benchmark")

    def _timed(self, updates: int) -> float:
        """Seconds of so many updates of the slowest process, which nobody waits for in between but they themselves."""
        self._synchronize()
        self.world.barrier()
        began = time.perf_counter()
        self._update(updates)
        self._synchronize()
        return self.world.largest(time.perf_counter() - began)[0]

    def _synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize(self.device)
