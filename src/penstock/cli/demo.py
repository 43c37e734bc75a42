"""``penstock demo``: from nothing to a model that writes Python, in minutes."""

from __future__ import annotations

import time
from pathlib import Path

import typer

PROMPTS = 3


def demo(
    minutes: float = typer.Option(5.0, "--minutes", min=0.05, help="Minutes that all of it may take."),
    out: Path = typer.Option(
        Path("runs/demo"), "--out", "-o", metavar="RUN", help="The folder that the run fills, emptied first."
    ),
) -> None:
    """Train a small code model on this machine's own Python library and let it write.

    Builds a token store, chooses a size that this machine can train in the given time, trains, draws the loss curve,
    measures bits per byte on held-out files beside `xz -9`, and completes held-out prompts.

    Example: `penstock demo --minutes 1`
    """
    began = time.monotonic()
    from penstock.core.processor import share_cores

    share_cores()
    from penstock.core.config import build, read_toml
    from penstock.core.files import write_atomic
    from penstock.core.progress import show
    from penstock.parallel.world import World
    from penstock.train import presets
    from penstock.train.config import TrainConfig
    from penstock.train.demo import EVALUATION, begin, clear, compare_with_xz, completions, texts_of
    from penstock.train.session import stoppable, train_to_the_end

    path = presets.path_of("demo")
    config = build(TrainConfig, read_toml(path), str(path))
    clear(out)
    with stoppable(out, World()):
        work = begin(config, out, began + 60 * minutes, show)
        summary = train_to_the_end(work, show, EVALUATION * 60 * minutes)
        if summary is None:
            return
        summary = compare_with_xz(work, summary)
        samples = []
        for sample in completions(out, texts_of(work).evaluated, PROMPTS, began + 60 * minutes):
            typer.secho(f"\n{sample.name}", dim=True)
            typer.echo(sample.prompt, nl=False)
            typer.secho(sample.completion, fg="cyan")
            samples.append(str(sample))
        write_atomic(out / "samples.txt", "\n".join(samples))
        behind = summary["bits_per_byte"] >= summary["xz_bits_per_byte"]
        more = " More training would do better: penstock demo --minutes 15." if behind else ""
        typer.echo(
            f"\n{summary['bits_per_byte']:.3f} bits per byte on {summary['documents']} held-out files; xz -9 on each "
            f"of them needs {summary['xz_bits_per_byte']:.3f}.{more}\n\nNext:\n"
            f"  penstock generate {out} --prompt 'def main('\n"
            f"  penstock train --preset demo --set minutes=30 --out runs/longer\n"
            f"  penstock papers"
        )
