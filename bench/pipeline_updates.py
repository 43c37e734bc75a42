"""Updates of a pipeline that no device waits for, beside those for which all wait: post-validation on and off.

Whole updates of the trainer, with AdamW and clipping, a run of them between two clocks. Where the norm never reaches
the limit, every update stands as it was taken; where it always does, each is made once the whole norm is known, and the
first forwards of the next one are made again. Without several GPUs, tiny shapes over gloo show that it works.
"""

from __future__ import annotations

import functools
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from penstock.core.bench import Bench
from penstock.core.config import build
from penstock.core.errors import PenstockError
from penstock.data.loader import Batch
from penstock.parallel.world import World
from penstock.testing.workers import Workers, serve
from penstock.train.config import TrainConfig
from penstock.train.loop import Trainer
from penstock.train.pipeline.pipeline import Pipeline

#: With fp32 masters, AdamW's moments and the copies that a rollback needs, half of what ``bench pipeline`` runs.
LARGE = {"hidden": 3072, "layers": 15, "heads": 24, "kv_heads": 8, "head_dim": 128, "ffn": 8192, "vocabulary": 32000}
TINY = {"hidden": 64, "layers": 7, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 128, "vocabulary": 512}

SCHEDULES = ("1f1b", "zb_h1", "zb_h2")
WAITING, VALIDATED = ", all wait", ", post-validated"
#: The largest norm of a gradient, and what that means.
LIMITS = {"the norm below the limit": 1e6, "the norm above the limit": 1e-6}
UPDATES, REPETITIONS = 6, 3
PATIENCE = 240.0


class Subjects:
    """In a worker: trainers by order. One at a time is in memory."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.on_cuda = torch.cuda.device_count() >= world.size
        self.device = torch.device(f"cuda:{world.local_rank}" if self.on_cuda else "cpu")
        if self.on_cuda:
            torch.cuda.set_device(self.device)
        self.length = 4096 if self.on_cuda else 32
        self.microbatches = 4 * world.size
        self.folder = Path(tempfile.mkdtemp(prefix="penstock-bench-"))
        shape = (self.microbatches, self.length)
        vocabulary = (LARGE if self.on_cuda else TINY)["vocabulary"]
        tokens = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
        self.batch = Batch(tokens, tokens, torch.zeros_like(tokens))
        world.sum_([torch.zeros(1, device=self.device)])  # NCCL begins with all processes
        self.prepared = ""

    def __call__(self, order: str) -> dict[str, Any]:
        """Answers ``order``, a schedule, whether all wait, and a limit, with what some updates took."""
        if order != self.prepared:
            self._prepare(order)
        peak = torch.cuda.max_memory_allocated() if self.on_cuda else 0
        return {"seconds": self._timed(UPDATES), "peak": peak}

    def _prepare(self, order: str) -> None:
        self.trainer: Trainer | None = None
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()
        name, _, limit = order.partition(" | ")
        schedule, _, how = name.partition(", ")
        pipeline = {"schedule": schedule, "post_validation": f", {how}" == VALIDATED, "timeout": PATIENCE / 3}
        config = build(TrainConfig, self._tree(pipeline, LIMITS[limit]), "the benchmark")
        assert config.model is not None
        made = Pipeline(config, config.model, self.folder, self.world)
        with torch.no_grad():
            part = made.part.to(self.device)
            for parameter in part.parameters():
                parameter.normal_(std=0.02)
        self.trainer = Trainer(config, part, None, None, self.folder, self.world, made)  # type: ignore[arg-type]
        self.prepared = order
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
        self._timed(4)  # loads kernels, finds memory, and is profiled

    def _tree(self, pipeline: dict[str, Any], clip: float) -> dict[str, Any]:
        tokens = self.microbatches * self.length
        return {
            "model": {**(LARGE if self.on_cuda else TINY), "context": self.length},
            "batch": {"tokens": tokens, "micro_tokens": self.length, "stages": [{"length": self.length}]},
            "optim": {"name": "adamw", "lr": 1e-6},
            "parallel": {"pipeline": self.world.size},
            "pipeline": pipeline,
            "precision": "bf16" if self.on_cuda else "fp32",
            "compile": False,
            "clip": clip,
            "steps": 1000,
        }

    def _timed(self, updates: int) -> float:
        """Seconds of so many updates of the slowest process, which nobody waits for in between but they themselves."""
        assert self.trainer is not None
        self._synchronize()
        self.world.barrier()
        began = time.perf_counter()
        for _ in range(updates):
            self.trainer.update(self.batch, self.length, 1.0)
        self.trainer.updater.settle()
        self._synchronize()
        return self.world.largest(time.perf_counter() - began)[0]

    def _synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize(self.device)


def main(bench: Bench) -> None:
    """Measures in a process for each GPU, or in two. After a schedule that fails, the others go on in new processes."""
    devices = torch.cuda.device_count()
    size = devices if devices > 1 else 2
    left = [(schedule, limit) for limit in LIMITS for schedule in SCHEDULES]
    while left:
        with Workers(Path(__file__), size) as workers:
            try:
                while left:
                    compare(bench, workers, size, *left.pop(0), real=devices > 1)
            except PenstockError as error:
                bench.console.print(f"left out: {error}", style="red")


def compare(bench: Bench, workers: Workers, size: int, schedule: str, limit: str, *, real: bool) -> None:
    """Measures one schedule at one limit."""
    peaks: dict[str, float] = {}

    def rate(how: str) -> float:
        ranks = workers.ask(f"{schedule}{how} | {limit}", PATIENCE)
        peaks[how] = max(rank["peak"] for rank in ranks) / 1e9
        return UPDATES * 4 * size * (4096 if real else 32) / ranks[0]["seconds"]

    parameters = "1.6 B parameters" if real else "tiny shapes, gloo"
    setting = f"{size} devices, {4 * size} microbatches, {parameters}, {limit}"
    rates = bench.turns(
        {how: functools.partial(rate, how) for how in (VALIDATED, WAITING)}, setting, REPETITIONS, uncounted=0
    )
    names: dict[str, Any] = {"subject": schedule + VALIDATED, "peer": schedule + WAITING, "setting": setting}
    bench.compared(
        **names, metric="training throughput", unit="tokens/s", values=rates[VALIDATED], peer_values=rates[WAITING]
    )
    if real:
        bench.row(
            **names,
            metric="peak memory of a device",
            unit="GB",
            better="lower",
            value=peaks[VALIDATED],
            peer_value=peaks[WAITING],
            ratio=peaks[VALIDATED] / peaks[WAITING],
        )


if __name__ == "__main__":
    serve(Subjects)
