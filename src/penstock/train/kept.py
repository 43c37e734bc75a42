"""Runs of presets that are trained once, and kept for whoever wants them again."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from penstock.core.config import apply_overrides, build, read_toml
from penstock.core.files import cache_folder
from penstock.core.progress import Reporter, silent
from penstock.train import presets
from penstock.train.config import TrainConfig
from penstock.train.run import Run
from penstock.train.session import train_to_the_end


def kept_run(preset: str, changes: Sequence[str], data: bytes, report: Reporter = silent) -> Path:
    """The folder of a run of ``preset`` with ``changes`` such as ``steps=20``, which is trained where none is kept of
    these settings and this ``data``: any bytes that differ where what is trained on does."""
    tree = apply_overrides(read_toml(presets.path_of(preset)), list(changes))
    digest = hashlib.blake2b(json.dumps(tree).encode() + data, digest_size=8).hexdigest()
    folder = cache_folder("bench") / f"{preset}-{digest}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            run = Path(scratch) / "run"
            train_to_the_end(Run.create(build(TrainConfig, tree, "the preset"), run, report=report), report)
            run.rename(folder)
    return folder
