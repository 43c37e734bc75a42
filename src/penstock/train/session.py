"""A training run as a person watches it: progress while it lasts, a picture and a summary when it ends."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from penstock.core.files import claim, sweep, write_atomic
from penstock.core.metrics import read_metrics
from penstock.core.processor import free_threads, on_threads
from penstock.core.progress import Bar, Reporter, quantity
from penstock.core.signals import termination_interrupts
from penstock.models.adapters import peft
from penstock.parallel.world import World
from penstock.train.material.contract import Material
from penstock.train.report import Report
from penstock.train.resuming import resume_command
from penstock.train.run import CHECKPOINTS, CONFIG, MODEL, Run

#: What a record of a validation holds, and how a picture calls it.
VALIDATED = {
    "validation_bits_per_byte": "validation (bits per byte)",
    "validation_held_out_loss": "validation (nats)",
}


@contextlib.contextmanager
def stoppable(folder: Path, world: World) -> Iterator[None]:
    """Ends Ctrl-C or SIGTERM inside the block with a line that says how to go on with the run in ``folder``."""
    with termination_interrupts():
        try:
            yield
        except KeyboardInterrupt:
            world.require_all()  # whoever started the processes ends them when one is lost: that is no wish of the user
            if world.leads:
                started = (folder / CONFIG).is_file()
                what = (
                    f"continue with: {resume_command(folder)}" if started else "the run had not begun, and left nothing"
                )
                print(f"stopped; {what}")


def train_to_the_end(run: Run, report: Reporter, evaluation: float | None = None) -> dict[str, Any] | None:
    """Trains, exports and evaluates ``run``, the last in ``evaluation`` seconds if given; returns its summary, or None
    when it was stopped before its end.

    Raises:
        UsageError: another process is training in the run's folder.
        PenstockError: see :meth:`~penstock.train.loop.Trainer.train`.
    """
    with claim(run.folder) if run.world.leads else contextlib.nullcontext():
        if run.world.leads:
            sweep(run.folder)
            sweep(run.folder / CHECKPOINTS)
        if not _train(run, report):
            if run.world.leads:
                print(f"stopped after {run.trainer.position.step} steps; continue with: {resume_command(run.folder)}")
            return None
        summary = run.finish(report, evaluation)
        if run.world.leads:
            draw_loss(run.folder)
            print(
                f"{_measured(run.material, summary)} after {summary['steps']} steps "
                f"({quantity(summary['tokens'], 'tok')}, {quantity(summary['tokens_per_s'], 'tok')}/s)\n"
                f"{'model' if run.config.target is None else 'head'}: {run.folder / 'model'} ({_stored(run)})   "
                f"loss curve: {run.folder / 'loss.png'}"
            )
        return summary


def _stored(run: Run) -> str:
    """What the finished model is stored as: an adapter on its base, or weights of a dtype, and why."""
    if (run.folder / MODEL / peft.CONFIG).is_file():
        return f"an adapter on {run.config.start_from}"
    stored = run.config.export_dtype or str(run.trainer.weights.dtype).removeprefix("torch.")
    return f"{stored}, like {run.config.start_from}" if run.config.start_from else stored


def _measured(material: Material, summary: dict[str, Any]) -> str:
    if summary.get("agreement"):
        shares = ", ".join(f"{share:.1%}" for share in summary["agreement"])
        return f"of the target's likeliest tokens on held-out documents the head has {shares} (by tokens ahead)"
    if summary.get("acceptance"):
        told = summary["acceptance"]
        return (
            f"on held-out documents the target accepts {told['accepted']:.1%} of drafted tokens, and the head expects "
            f"{told['predicted']:.1%} (cross-entropy {told['cross_entropy']:.3f} nats; {told['constant']:.3f} of a "
            "constant)"
        )
    what = "documents" if material.measure == "bits_per_byte" else "examples"
    if summary.get(material.measure) is None:
        return f"not evaluated, since no {what} are held out,"
    return f"{summary[material.measure]:.3f} {material.unit} on held-out {what}"


def _train(run: Run, report: Reporter) -> bool:
    """Whether the run was trained to its end. Whatever threads it chose, what comes behind has those from before."""
    with on_threads(torch.get_num_threads()):
        return _train_on(run, report)


def _train_on(run: Run, report: Reporter) -> bool:
    trainer = run.trainer
    if trainer.progress < 1.0:
        choose_threads(run)
        trainer.choose_compile()
    if trainer.config.compile and trainer.progress < 1.0:
        with report("compiling", None, "s") as bar:
            began = time.monotonic()
            obstacle = trainer.compile()
            bar.advance(time.monotonic() - began)
        if obstacle and run.world.leads:
            print(f"training without torch.compile, which is slower: {obstacle}")
    if run.world.leads:
        run.write_config()
        for key, choice in run.config.chosen.items():
            print(f"{key} {choice}")
    label = f"training {quantity(trainer.parameters, '')}parameters"
    with report(label, 100.0, "%") as bar:
        return trainer.train(_Ticker(bar, trainer.progress))


def choose_threads(run: Run) -> None:
    """Leaves alone the cores that other work holds, in a run that follows the clock.

    One that follows steps is to have the same bits at any time, and so as many threads at any time.
    """
    if run.config.minutes and run.world.size == 1 and run.device.type == "cpu" and torch.get_num_threads() > 1:
        answer = free_threads(torch.get_num_threads())
        run.trainer.note("threads", f"{answer.choice}: {answer.reason}")


class _Ticker:
    """Moves the progress bar, in percent, with what matters of each step beside it."""

    def __init__(self, bar: Bar, progress: float) -> None:
        self._bar, self._seen = bar, progress
        bar.advance(100 * progress)

    def __call__(self, report: Report) -> None:
        rate = quantity(report.flops_per_s, "FLOP/s") if report.mfu is None else f"MFU {report.mfu:.1%}"
        loss = "skipped" if report.skipped else f"loss {report.loss:.3f}"
        note = f"step {report.step}, {loss}, {quantity(report.tokens_per_s, 'tok')}/s, {rate}"
        self._bar.advance(100 * (report.progress - self._seen), note)
        self._seen = report.progress


def draw_loss(folder: Path) -> Path:
    """Draws ``folder/loss.png`` from its metrics: the loss in nats a token, and the learning-rate factor."""
    from matplotlib.figure import Figure  # pyplot takes longer to import, and keeps figures for the whole process

    every = read_metrics(folder / "metrics.jsonl")
    records = [record for record in every if "loss" in record]
    validated = [(record["step"], key, record[key]) for record in every for key in record if key in VALIDATED]
    steps = [record["step"] for record in records]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, [record["loss"] for record in records], linewidth=1, color="tab:blue")
    axes.set(xlabel="step", ylabel="training loss (nats per token)", title=f"{folder.name}: training loss")
    axes.grid(alpha=0.3)
    if validated:
        at, keys, measured = zip(*validated, strict=True)
        axes.plot(at, measured, "o-", color="tab:green", label=VALIDATED[keys[0]])
        axes.legend(loc="upper right")
    rates = axes.twinx()
    rates.plot(steps, [record["lr_factor"] for record in records], linewidth=1, color="tab:orange", alpha=0.6)
    rates.set(ylabel="learning-rate factor", ylim=(0, 1.05))
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomic(folder / "loss.png", picture.getvalue())
    return folder / "loss.png"
