"""The laws of ``power_lines`` from tables of finished runs: ``penstock plan hyper --trials runs.csv``."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from penstock.core.errors import DataError
from penstock.train.hyper.power_lines import PowerLaw


@dataclasses.dataclass(frozen=True)
class Trial:
    """A finished run: its scale, its settings (``batch`` in tokens), and its final loss (averaged, if over seeds)."""

    parameters: float
    tokens: float
    batch: float
    lr: float
    weight_decay: float
    loss: float

    @property
    def timescale(self) -> float:
        """AdamW's timescale B / (lr * weight_decay * D), a share of the run."""
        return self.batch / (self.lr * self.weight_decay * self.tokens)


def read_trials(path: Path) -> list[Trial]:
    """The rows of a CSV file whose first line names the columns: those of :class:`Trial`, in any order, and others.

    Raises:
        DataError: it cannot be read, a column is missing, or a value is no positive number.
    """
    names = [field.name for field in dataclasses.fields(Trial)]
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    trials = []
    for line, row in enumerate(rows, 2):
        try:
            values = [float(row[name]) for name in names]
        except (KeyError, TypeError, ValueError):
            values = []
        if not values or not all(0 < value < np.inf for value in values):
            raise DataError(
                f"line {line} of {path} is no finished run",
                hint=f"It must have positive numbers in the columns {', '.join(names)}.",
            )
        trials.append(Trial(*values))
    return trials


def fit_laws(trials: list[Trial]) -> dict[str, PowerLaw]:
    """Those of the rule's laws that the table shows, by the names of its options.

    Raises:
        DataError: it shows none.
    """
    fits = {"timescale": fit_timescale, "optimal_batch": fit_optimal_batch, "critical_batch": fit_critical_batch}
    laws = {}
    for name, fit in fits.items():
        with contextlib.suppress(DataError):
            laws[name] = fit(trials)
    if not laws:
        raise DataError(
            f"a table of {len(trials)} runs shows none of the laws of power_lines",
            hint="Vary the weight decay, or the batch, at two scales or more, to both sides of the best setting.",
        )
    return laws


def fit_power_law(points: Iterable[tuple[float, float]]) -> PowerLaw:
    """The least-squares line through (x, y) in logarithms.

    Raises:
        DataError: fewer than two different x.
    """
    pairs = list(points)
    if len({x for x, _ in pairs}) < 2:
        raise DataError(
            f"a power law needs optima at two scales, and the table shows {len(pairs)}",
            hint="Add runs: more scales, and at each of them settings on both sides of the best one.",
        )
    x, y = np.log(np.array(pairs)).T
    exponent, intercept = np.polyfit(x, y, 1)
    return PowerLaw(coefficient=float(np.exp(intercept)), exponent=float(exponent))


def fit_timescale(trials: Iterable[Trial]) -> PowerLaw:
    """The law of the best timescale in D / N, from runs that vary the weight decay at each (N, D, B).

    Raises:
        DataError: fewer than two ratios D / N whose best weight decay lies between others.
    """
    points = []
    for (parameters, tokens, _), runs in _groups(trials, lambda t: (t.parameters, t.tokens, t.batch)):
        best = _minimum((t.timescale, t.loss) for t in runs)
        if best is not None:
            points.append((tokens / parameters, best[0]))
    return fit_power_law(points)


def fit_optimal_batch(trials: Iterable[Trial]) -> PowerLaw:
    """The law of the best batch in D, from runs that vary the batch at each (N, D), each at its best weight decay.

    Raises:
        DataError: fewer than two D whose best batch lies between others.
    """
    points = []
    for (_, tokens), runs in _groups(trials, lambda t: (t.parameters, t.tokens)):
        best = _minimum((batch, _tuned(members)) for batch, members in _groups(runs, lambda t: t.batch))
        if best is not None:
            points.append((tokens, best[0]))
    return fit_power_law(points)


def fit_critical_batch(trials: Iterable[Trial]) -> PowerLaw:
    """The law of the critical batch in D_min, from runs that vary the batch and the tokens at each N.

    To some loss, batch B takes D = D_min (1 + B / B_crit) tokens (McCandlish et al., 2018). At losses that all batches
    of an N reach, D is interpolated along the runs of each, and the straight line through D over B gives D_min and
    B_crit. Batches smaller than the best one cost more tokens too, for other reasons: leave them out.

    Raises:
        DataError: no two losses that several batches reach.
    """
    points = []
    for _, runs in _groups(trials, lambda t: t.parameters):
        curves = {}
        for batch, members in _groups(runs, lambda t: t.batch):
            lengths = [(_tuned(equal), np.log(tokens)) for tokens, equal in _groups(members, lambda t: t.tokens)]
            curves[batch] = np.array(sorted(lengths)).T
        if len(curves) < 2:
            continue
        lowest = max(losses[0] for losses, _ in curves.values())
        highest = min(losses[-1] for losses, _ in curves.values())
        if lowest >= highest:
            continue
        for loss in np.linspace(lowest, highest, 8):
            needed = [np.exp(np.interp(loss, losses, lengths)) for losses, lengths in curves.values()]
            slope, least = np.polyfit(list(curves), needed, 1)
            if slope > 0 and least > 0:
                points.append((float(least), float(least / slope)))
    return fit_power_law(points)


def _groups(trials: Iterable[Trial], key: Callable[[Trial], Any]) -> list[tuple[Any, list[Trial]]]:
    """(key, trials with it), keys ascending."""
    return [(k, list(members)) for k, members in itertools.groupby(sorted(trials, key=key), key)]


def _minimum(points: Iterable[tuple[float, float]]) -> tuple[float, float] | None:
    """The lowest point (x, loss) of the parabola, over log x, through the lowest of ``points`` and its neighbours.

    None where the lowest has no neighbour on one side: then the minimum may lie outside.
    """
    ordered = sorted(points)
    lowest = min(range(len(ordered)), key=lambda i: ordered[i][1])
    if not 0 < lowest < len(ordered) - 1:
        return None
    x, loss = np.array(ordered[lowest - 1 : lowest + 2]).T
    middle = np.log(x[1])
    parabola = np.poly1d(np.polyfit(np.log(x) - middle, loss, 2))
    vertex = -parabola[1] / (2 * parabola[2])
    return float(np.exp(vertex + middle)), float(parabola(vertex))


def _tuned(runs: list[Trial]) -> float:
    """The loss at the best weight decay; the lowest seen where that is not between others."""
    best = _minimum((t.timescale, t.loss) for t in runs)
    return min(t.loss for t in runs) if best is None else best[1]
