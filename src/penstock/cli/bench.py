"""``penstock bench``: runs a benchmark of the source tree."""

from __future__ import annotations

from pathlib import Path

import typer


def bench(
    name: str | None = typer.Argument(None, help="Which benchmark; without it, all are listed."),
    quick: bool = typer.Option(False, "--quick", help="Small settings, to see that it works; writes no result."),
    out: Path | None = typer.Option(None, "--out", help="Where to write the result.", metavar="FILE"),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda or cuda:N."),
) -> None:
    """Measure side by side with a peer, print a table, and write bench/results/NAME-DEVICE.json.

    Example: `penstock bench train --quick`
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from penstock.core.bench import Bench, load, scripts, summary

    if name is None:
        table = Table("Benchmark", "What it measures")
        for known, path in scripts().items():
            table.add_row(known, Text(summary(path)))
        Console().print(table)
        return
    script = load(name)

    from penstock.core.devices import pick

    run = Bench(name, pick(device), quick=quick, out=out)
    script.main(run)
    run.finish()
