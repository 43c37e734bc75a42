"""Progress of long work: a bar on a terminal, a line now and then anywhere else.

Functions that take long accept a :data:`Reporter` and default to :func:`silent`; the command line passes :func:`show`::

    with reporter("tokenizing", corpus.size(), "B") as bar:
        for piece in work:
            bar.advance(len(piece))
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class Bar(Protocol):
    """One piece of work under way."""

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Reports ``amount`` more units done; a ``note`` such as ``"loss 2.31"`` replaces the one before."""
        ...


#: ``reporter(label, total, unit)``; ``total`` is None where it is not known.
Reporter = Callable[[str, float | None, str], AbstractContextManager[Bar]]


#: Units that take SI prefixes; others are words, in the singular, for things that are counted.
SYMBOLS = {"", "B", "tok", "FLOP", "FLOP/s", "s", "%"}


def quantity(value: float, unit: str) -> str:
    """``value`` to three digits, with an SI prefix, or all of a count: ``12.1 MB``, ``5.8 ktok``, ``12,345 lines``."""
    if unit not in SYMBOLS:
        return f"{value:,.0f} {unit}s" if value >= 1000 else f"{value:.3g} {unit}{'' if value == 1 else 's'}"
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def duration(seconds: float) -> str:
    """``seconds`` for people: ``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class _Silent:
    def advance(self, amount: float = 1, note: str = "") -> None:
        pass


@contextlib.contextmanager
def silent(label: str, total: float | None, unit: str) -> Iterator[Bar]:
    """Reports nothing."""
    yield _Silent()


class Lines:
    """Progress as plain lines, at most one every ``every`` seconds and one at the end, for logs and pipes."""

    def __init__(
        self,
        label: str,
        total: float | None,
        unit: str,
        *,
        stream: TextIO,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self._stream, self._every, self._clock = stream, every, clock
        self._start = self._printed = clock()
        self._done, self._note = 0.0, ""

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._done += amount
        self._note = note or self._note
        now = self._clock()
        if now - self._printed >= self._every:
            self._printed = now
            self._print(now, ended=False)

    def finish(self) -> None:
        """Prints the last line."""
        self._print(self._clock(), ended=True)

    def _print(self, now: float, *, ended: bool) -> None:
        rate = self._done / max(now - self._start, 1e-9)
        parts = [quantity(self._done, self.unit)]
        if self.total:
            parts[0] += f" of {quantity(self.total, self.unit)} ({min(self._done / self.total, 1):.0%})"
        parts.append(f"{quantity(rate, self.unit)}/s")
        if self.total and not ended and 0 < self._done < self.total:
            parts.append(f"{duration((self.total - self._done) / rate)} left")
        if self._note:
            parts.append(self._note)
        print(f"{self.label}: {', '.join(parts)}", file=self._stream, flush=True)


class _Rate(ProgressColumn):
    """Amount done and units per second, as :func:`quantity` writes them."""

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        done = quantity(task.completed, unit)
        speed = task.finished_speed or task.speed
        return Text(done if speed is None else f"{done}, {quantity(speed, unit)}/s", style="progress.data.speed")


class _Rich:
    def __init__(self, progress: Progress, label: str, total: float | None, unit: str) -> None:
        self._progress, self._note = progress, ""
        self._task = progress.add_task(label, total=total, unit=unit, note="")

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._note = note or self._note
        self._progress.update(self._task, advance=amount, note=self._note)


@contextlib.contextmanager
def show(label: str, total: float | None, unit: str) -> Iterator[Bar]:
    """Reports on standard error: a bar with rate and time left on a terminal, :class:`Lines` elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        lines = Lines(label, total, unit, stream=sys.stderr)
        yield lines
        lines.finish()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield _Rich(progress, label, total, unit)
