"""Metrics of a run: one JSON object a line, and wherever else they are shown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penstock.core.files import explain_os_errors, write_atomic
from penstock.core.trackers import Tracker, tensorboard


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, oldest first, up to the first line that was cut off."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class MetricsLog:
    """Appends records to ``folder/metrics.jsonl``; opening it at step s drops records of later steps.

    So the file of a resumed run reads as if the run had never stopped.
    """

    def __init__(self, folder: Path, step: int = 0, trackers: Sequence[Tracker] = ()) -> None:
        path = folder / "metrics.jsonl"
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept))
        with explain_os_errors(f"cannot write {path}"):
            self._file = path.open("ab", buffering=0)  # with nothing kept back, closing cannot fail a second time
        self._trackers = [*tensorboard(folder, step), *trackers]

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records ``values`` for ``step``."""
        with explain_os_errors(f"cannot write {self._file.name}"):
            line = (json.dumps({"step": step, **values}) + "\n").encode()
            while line:
                line = line[self._file.write(line) :]
        for tracker in self._trackers:
            tracker.write(step, values)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()
