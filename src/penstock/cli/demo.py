"""``penstock demo``: from nothing to a model that writes Python, in minutes."""

from __future__ import annotations

from pathlib import Path

import typer

PROMPTS = 3


def demo(
    minutes: float = typer.Option(3.0, "--minutes", min=0.05, help="Minutes of training."),
    out: Path = typer.Option(
        Path("runs/demo"), "--out", "-o", metavar="RUN", help="The folder that the run fills, emptied first."
    ),
) -> None:
    """Train a small code model on this machine's own Python library and let it write.

    Builds a token store, trains for the given time, draws the loss curve, measures bits per byte on held-out files
    beside `xz -9`, and completes held-out prompts.

    Example: `penstock demo --minutes 1`
    """
    from penstock.core.config import apply_overrides, build, read_toml
    from penstock.core.files import write_atomic
    from penstock.core.progress import show
    from penstock.parallel.world import World
    from penstock.train import presets
    from penstock.train.config import TrainConfig
    from penstock.train.demo import clear, compare_with_xz, completions
    from penstock.train.run import Run
    from penstock.train.session import stoppable, train_to_the_end

    path = presets.path_of("demo")
    config = build(TrainConfig, apply_overrides(read_toml(path), [f"minutes={minutes}"]), str(path))
    clear(out)
    with stoppable(out, World()):
        work = Run.create(config, out, report=show)
        summary = train_to_the_end(work, show)
        if summary is None:
            return
        summary = compare_with_xz(work, summary)
        samples = []
        for sample in completions(out, work.store.split("held_out"), PROMPTS):
            typer.secho(f"\n{sample.name}", dim=True)
            typer.echo(sample.prompt, nl=False)
            typer.secho(sample.completion, fg="cyan")
            samples.append(str(sample))
        write_atomic(out / "samples.txt", "\n".join(samples))
        typer.echo(
            f"\n{summary['bits_per_byte']:.3f} bits per byte on held-out files; xz -9 on each of them needs "
            f"{summary['xz_bits_per_byte']:.3f}.\n\nNext:\n"
            f"  penstock generate {out} --prompt 'def main('\n"
            f"  penstock train --preset demo --set minutes=30 --out runs/longer\n"
            f"  penstock papers"
        )
