"""Updates of a pipeline that no device waits for, beside those for which all wait: post-validation on and off.

Whole updates of the trainer, with AdamW and clipping, a run of them between two clocks. Where the norm never reaches
the limit, every update stands as it was taken; where it always does, each is made once the whole norm is known, and the
first forwards of the next one are made again. Without several GPUs, tiny shapes over gloo show that it works.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from penstock.core.bench import Bench
from penstock.core.errors import PenstockError
from penstock.data.loader import Batch
from penstock.parallel.world import World
from penstock.testing.timed_updates import TimedUpdates
from penstock.testing.workers import Workers, serve
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


class Subjects(TimedUpdates):
    """In a worker: trainers by a schedule, whether all wait, and a limit."""

    def __init__(self, world: World) -> None:
        super().__init__(world, LARGE, TINY, UPDATES, warm=4)
        self.microbatches = 4 * world.size
        self.folder = Path(tempfile.mkdtemp(prefix="penstock-bench-"))
        shape = (self.microbatches, self.length)
        tokens = torch.randint(self.shape["vocabulary"], shape, generator=torch.Generator().manual_seed(0))
        self.batch = Batch(tokens, tokens, torch.zeros_like(tokens))
        world.sum_([torch.zeros(1, device=self.device)])  # NCCL begins with all processes

    def made(self, order: str) -> Callable[[int], object]:
        name, _, limit = order.partition(" | ")
        schedule, _, how = name.partition(", ")
        config = self.config(
            self.microbatches * self.length,
            parallel={"pipeline": self.world.size},
            pipeline={"schedule": schedule, "post_validation": f", {how}" == VALIDATED, "timeout": PATIENCE / 3},
            compile=False,
            clip=LIMITS[limit],
        )
        assert config.model is not None
        made = Pipeline(config, config.model, self.folder, self.world)
        with torch.no_grad():
            part = made.part.to(self.device)
            for parameter in part.parameters():
                parameter.normal_(std=0.02)
        trainer = Trainer(config, part, None, None, self.folder, self.world, made)  # type: ignore[arg-type]
        return functools.partial(self._updated, trainer)

    def _updated(self, trainer: Trainer, count: int) -> None:
        for _ in range(count):
            trainer.update(self.batch, self.length, 1.0)
        trainer.updater.settle()


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
