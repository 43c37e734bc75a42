"""What a benchmark leaves behind: one JSON file under ``bench/results`` for each benchmark and device.

The figures in the README, in the documents and behind ``penstock papers`` all come from these files, and from those of
the same format under ``bench/peers``, which hold what other systems were measured to do. Reading them needs no torch;
:mod:`penstock.core.bench` measures and writes them.
"""

from __future__ import annotations

import datetime
import enum
import math
from pathlib import Path
from typing import Literal, Self

from pydantic import FiniteFloat, PositiveFloat, PositiveInt, model_validator

from penstock.core.config import Config, build
from penstock.core.files import read_json

#: How far a ratio may fall behind 1 for a claim of "no loss" to hold: more than the noise of most benchmarks.
PARITY = 0.05


class Verdict(enum.StrEnum):
    """What a row says about the direction that its papers claim; the size of the effect is for readers to compare, but
    where a row names the size that it is held to."""

    CONFIRMED = "confirmed"
    CONTRADICTED = "contradicted"
    UNDECIDED = "undecided"  #: the repetitions fall on both sides


class Row(Config):
    """One measured figure, beside a peer's where there is a peer.

    Attributes:
        subject: what was measured, for instance a policy's name or ``penstock``.
        setting: under which conditions, for instance ``15M parameters, bf16``.
        metric: what the figure counts, for instance ``training throughput``, in ``unit``.
        value: median over ``repetitions``; ``low`` and ``high`` are the least and the greatest of them.
        better: whether a higher or a lower value is the better one.
        peer: what it was compared with, in turn and in the same process; its figures are ``peer_value``, ``peer_low``
            and ``peer_high``.
        ratio: median of ``value / peer_value`` over the pairs of repetitions; ``ratio_low`` and ``ratio_high`` are
            the least and the greatest.
        papers: ids of the papers whose claim this row tests: the subject does what the paper proposes, the peer is the
            paper's own baseline on the same engine, and the metric is what the claim speaks of. Nothing else is
            evidence for a paper, however fast.
        claim: what those papers say of the ratio: the subject is better (``gain``), or it is not worse by more than
            :data:`PARITY` (``parity``), as where memory is saved "without loss of throughput".
        least: how many times better the subject is at least, where the papers claim a gain of that size throughout
            ("close to 4x"); None where they name a direction, or the best of their cases ("up to 2.8x").
        simulated: whether a model of the device gave the figures, and no clock.
        note: what a reader has to know beside: in what the peer's conditions differ, or why figures are missing.
    """

    subject: str
    setting: str
    metric: str
    value: FiniteFloat
    unit: str
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    repetitions: PositiveInt = 1
    better: Literal["higher", "lower"] = "higher"
    peer: str | None = None
    peer_value: FiniteFloat | None = None
    peer_low: FiniteFloat | None = None
    peer_high: FiniteFloat | None = None
    ratio: FiniteFloat | None = None
    ratio_low: FiniteFloat | None = None
    ratio_high: FiniteFloat | None = None
    papers: tuple[int, ...] = ()
    claim: Literal["gain", "parity"] = "gain"
    least: PositiveFloat | None = None
    simulated: bool = False
    note: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len({self.peer is None, self.peer_value is None, self.ratio is None}) == 2:
            raise ValueError("peer, peer_value and ratio go together: give all three or none")
        if self.papers and self.ratio is None:
            raise ValueError("a row that is evidence for a paper stands beside the paper's baseline: give a peer")
        return self

    @property
    def verdict(self) -> Verdict | None:
        """Whether the ratio, over all repetitions, lies where :attr:`claim` says; None where there is no peer."""
        if self.ratio is None:
            return None
        ratios = [self.ratio, self.ratio_low or self.ratio, self.ratio_high or self.ratio]
        gains = [ratio if self.better == "higher" else 1 / ratio for ratio in ratios]
        if self.claim == "parity":
            held = [gain >= 1 - PARITY for gain in gains]
        else:
            held = [gain > (self.least or 1) for gain in gains]
        if all(held):
            return Verdict.CONFIRMED
        return Verdict.UNDECIDED if any(held) else Verdict.CONTRADICTED


class Result(Config):
    """All that one run of a benchmark measured, and what it ran on.

    Attributes:
        device: short label of the hardware, part of the file's name (``cpu-2``, ``h100``); ``hardware`` in full.
        versions: version of each package that matters, by name.
        commit: the source's commit; ``-dirty`` follows where the tree had changes, ``unknown`` where there is none.
        source: where the figures come from, if not from the benchmark ``name`` of this repository.
        quick: whether this was a quick run, which proves that the script works and measures nothing.
    """

    name: str
    device: str
    hardware: str
    date: datetime.date
    versions: dict[str, str]
    commit: str
    source: str = ""
    quick: bool = False
    rows: tuple[Row, ...]

    def rows_on(self, paper: int) -> list[Row]:
        """The rows that test the claim of ``paper``."""
        return [row for row in self.rows if paper in row.papers]


def repository() -> Path | None:
    """Root of the source tree that this package runs from; None where it was installed without one."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "pyproject.toml").is_file() and (root / "src" / "penstock").is_dir() else None


def results_folder() -> Path | None:
    """``bench/results`` of the source tree; None where there is no source tree."""
    root = repository()
    return root / "bench" / "results" if root else None


def peers_folder() -> Path | None:
    """``bench/peers`` of the source tree; None where there is no source tree."""
    root = repository()
    return root / "bench" / "peers" if root else None


def read_results(folder: Path | None) -> list[Result]:
    """The results in ``folder`` in order of file name, quick runs left out; none where there is no such folder.

    Raises:
        PenstockError: a file is not JSON, or not a result; the message names it and every fault.
    """
    paths = sorted(folder.glob("*.json")) if folder else []
    found = [build(Result, read_json(path), source=str(path)) for path in paths]
    return [result for result in found if not result.quick]


def format_number(value: float) -> str:
    """Four significant digits, or all digits before the point: ``1.940``, ``12.34``, ``17,676``, ``1.5e-07``."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    return f"{value:.4g}" if exponent < -4 else f"{value:,.{max(0, 3 - exponent)}f}"


#: Headings of :func:`cells`.
HEADINGS = ("Subject", "Setting", "Metric", "Median (range)", "n", "Peer", "Peer's median (range)", "Ratio (range)")


def cells(row: Row) -> tuple[str, ...]:
    """A row as the cells of a table under :data:`HEADINGS`; an arrow shows which way is better."""

    def spread(value: float | None, low: float | None, high: float | None, suffix: str) -> str:
        if value is None:
            return ""
        text = f"{format_number(value)}{suffix}"
        return text if low is None or high is None else f"{text} ({format_number(low)}–{format_number(high)})"

    unit = f" {row.unit}" if row.unit else ""
    return (
        row.subject,
        f"{row.setting} ({row.note})" if row.note else row.setting,
        f"{row.metric} {'↑' if row.better == 'higher' else '↓'}",
        spread(row.value, row.low, row.high, unit),
        str(row.repetitions),
        row.peer or "",
        spread(row.peer_value, row.peer_low, row.peer_high, unit),
        spread(row.ratio, row.ratio_low, row.ratio_high, "×"),
    )
