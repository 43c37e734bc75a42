"""The demo: held-out bits per byte after five minutes in all, beside xz -9 on each of the same files.

A full run also renews what the README shows of it: the loss curve and a sample.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from penstock.core.bench import Bench


def main(bench: Bench) -> None:
    """Runs ``penstock demo`` as a user would, in a process of its own."""
    minutes = 0.5 if bench.quick else 5
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "demo"
        command = [sys.executable, "-m", "penstock", "demo", "--minutes", str(minutes), "--out", str(run)]
        whole = bench.seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
        summary = json.loads((run / "summary.json").read_text())
        precision = json.loads((run / "run.json").read_text())["precision"]
        if not bench.quick:
            documents = Path(__file__).parents[1] / "docs"
            shutil.copyfile(run / "loss.png", documents / "images" / "demo-loss.png")
            shutil.copyfile(run / "samples.txt", documents / "demo-sample.txt")
    size = f"{summary['parameters'] / 1e6:.1f} M parameters"
    setting = f"{minutes} min in all, of which {summary['seconds'] / 60:.1f} of training; {size}, {precision}"
    common = {"subject": "penstock demo", "setting": setting}
    ours, theirs = summary["bits_per_byte"], summary["xz_bits_per_byte"]
    bench.row(
        **common,
        metric="bits per byte",
        unit="bit",
        better="lower",
        value=ours,
        peer="xz -9",
        peer_value=theirs,
        ratio=ours / theirs,
    )
    bench.row(**common, metric="training throughput", unit="tokens/s", value=summary["tokens_per_s"])
    bench.row(**common, metric="whole demo", unit="s", better="lower", value=whole)
