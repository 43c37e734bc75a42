"""A folder with the results of a search: written as they come, resumed where it was stopped or killed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penstock.core.errors import UsageError
from penstock.core.files import explain_os_errors, fsync_directory, read_json, read_text, write_json


class Results:
    """The results in a folder: ``KIND.json`` says how they are made, ``results.jsonl`` has a line for each problem.

    A line is written once, when its problem is done, and is durable then; so the file itself says what is left.

    Args:
        folder: made if it is not there.
        settings: what decides the results. A folder that was begun with others is refused.
        kind: what they are results of, a word.

    Raises:
        UsageError: the folder holds results of other settings.
        PenstockError: it cannot be read or written.

    Attributes:
        done: the records that are there, by the problem's place.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], kind: str = "search") -> None:
        with explain_os_errors(f"cannot write {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
        described = folder / f"{kind}.json"
        settings = json.loads(json.dumps(settings))
        if described.exists():
            before = read_json(described)
            unlike = sorted(name for name in {*before, *settings} if before.get(name) != settings.get(name))
            if unlike:
                raise UsageError(
                    f"{folder} holds the results of another {kind}: it differs in {', '.join(unlike)}",
                    hint=f"Name another folder with --out, or go on with the settings in its {kind}.json.",
                )
        else:
            write_json(described, settings)
        self._path = folder / "results.jsonl"
        self.done: dict[int, dict[str, Any]] = {}
        with explain_os_errors(f"cannot open {self._path}"):
            self._file = self._path.open("a+b")
            fsync_directory(folder)
        self._read()

    def _read(self) -> None:
        """Takes in the lines that are there. A last one that a killed run left unfinished is cut off."""
        whole = 0
        self._file.seek(0)
        for raw in self._file:
            try:
                record = json.loads(raw) if raw.endswith(b"\n") else None
                place = None if record is None else int(record["place"])
            except (ValueError, LookupError, TypeError):
                place = None
            if record is None or place is None:
                break
            self.done[place] = record
            whole += len(raw)
        self._file.truncate(whole)

    def write(self, place: int, record: Mapping[str, Any]) -> None:
        """Adds the result of a problem."""
        line = {"place": place, **record}
        with explain_os_errors(f"cannot write {self._path}"):
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        self.done[place] = json.loads(json.dumps(line))

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()


def read_results(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings of a search, and the records of the problems that are done, in their order.

    Raises:
        UsageError: the folder holds no results of a search.
    """
    if not (folder / "search.json").exists():
        raise UsageError(f"{folder} has no results of a search", hint="Name the folder of penstock search --out.")
    lines = read_text(folder / "results.jsonl").splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be unfinished
    if not records:
        raise UsageError(f"{folder} has no finished problem yet")
    return read_json(folder / "search.json"), sorted(records, key=lambda record: int(record["place"]))


def summary(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What results come to, in lines: how many are done and right, what was spent, and coverage where it was asked."""
    from penstock.search.coverage import coverage, fit_saturation, power_law

    count = len(records)
    totals = {name: sum(record["ledger"][name] for record in records) for name in ("generated", "tokens", "scorings")}
    mean = sum(record["score"] or 0.0 for record in records) / max(1, count)
    lines = [
        f"{count:,} problems, mean score {mean:.3f}; {totals['generated']:,} tokens generated, "
        f"{totals['tokens']:,.0f} computed, {totals['scorings']:,} texts scored"
    ]
    for name, what in (("exhausted", "came to the end of their budget"), ("error", "failed")):
        found = [record for record in records if record[name]]
        if found:
            lines.append(f"{len(found):,} {what}" + (f": {found[0][name]}" if name == "error" else ""))
    failures = sum(record["ledger"]["failures"] for record in records)
    if failures:
        reasons = [node["error"] for record in records for node in record["tree"] if node["error"]]
        lines.append(f"{failures:,} texts could not be scored" + (f"; the first: {reasons[0]}" if reasons else ""))
    counts = [
        (record["notes"]["samples"], record["notes"]["right"]) for record in records if "right" in record["notes"]
    ]
    if counts:
        most = min(samples for samples, _ in counts)
        ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k <= most]
        covered = [coverage(counts, k) for k in ks]
        lines.append("pass@k: " + ", ".join(f"{k}: {value:.3f}" for k, value in zip(ks, covered, strict=True)))
        if sum(0 < value < 1 for value in covered) > 1:
            a, b = power_law(ks, covered)
            lines.append(f"coverage = exp({a:.3f} k^{b:.3f})")
            ceiling, rate = fit_saturation(ks, covered)
            lines.append(f"saturation: ceiling={ceiling:.3g}, rate={rate:.3g}")
    return lines
