"""Measuring side by side: what the scripts under ``bench/`` need, and nothing else.

A benchmark is a script ``bench/NAME.py`` with a docstring and a function ``main(bench)``. A row that tests the claim of
a paper against that paper's own baseline names it in ``papers``; see :class:`~penstock.core.results.Row`::

    def main(bench: Bench) -> None:
        tokens = 2**14 if bench.quick else 2**20
        bench.compare(
            subject="penstock", peer="transformers", setting="15M parameters, fp32",
            metric="training throughput", unit="tokens/s",
            run=lambda: tokens / bench.seconds(ours), peer_run=lambda: tokens / bench.seconds(theirs),
        )
"""

from __future__ import annotations

import ast
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from penstock.core.config import build
from penstock.core.errors import PenstockError, UsageError, nearest
from penstock.core.files import write_json
from penstock.core.progress import duration
from penstock.core.results import HEADINGS, Result, Row, cells, repository, results_folder

if TYPE_CHECKING:
    import torch

Run = Callable[[], float]
T = TypeVar("T")

#: Distributions whose versions a result records, where they are installed.
PACKAGES = (
    "penstock",
    "torch",
    "triton",
    "flashinfer-python",
    "transformers",
    "tokenizers",
    "numpy",
    "vllm",
    "sglang",
)

#: Seconds of a run from which on its end is told.
LONG = 5.0

#: Repetitions of a quick run, whatever the script asks for.
QUICK_REPETITIONS = 2


class Bench:
    """One run of a benchmark on one device: collects rows, then prints and writes them.

    The result goes to ``out``, by default ``bench/results/NAME-DEVICE.json``; a quick run is written only where ``out``
    says. Until it is complete, what there is of it is in ``OUT.partial``, so that a run that is cut off loses no row.

    Attributes:
        name: the benchmark's name.
        device: where its subjects run.
        quick: whether only to show that the script works; scripts shrink their settings then.
        rows: what was measured so far.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        *,
        quick: bool = False,
        out: Path | None = None,
    ) -> None:
        self.name = name
        self.device = device
        self.quick = quick
        self.rows: list[Row] = []
        self._out = out
        self.console = Console(stderr=True)

    def seconds(self, run: Callable[[], object]) -> float:
        """Wall seconds of one call of ``run``, with all work that it queues on the device."""
        from penstock.core.devices import synchronize

        synchronize(self.device)
        start = time.perf_counter()
        run()
        synchronize(self.device)
        return time.perf_counter() - start

    def row(self, **fields: Any) -> Row:
        """Adds a row that was measured by other means; ``fields`` are those of :class:`Row`.

        Raises:
            ConfigError: they are not a row.
        """
        row = build(Row, fields, source=f"a row of the benchmark {self.name!r}")
        self.rows.append(row)
        self.console.print(Text("  ".join(filter(None, cells(row)))), style="dim")
        if (out := self._target()) is not None:
            self._write(_partial(out))
        return row

    def measure(
        self,
        *,
        subject: str,
        setting: str,
        metric: str,
        unit: str,
        run: Run,
        better: Literal["higher", "lower"] = "higher",
        repetitions: int = 5,
    ) -> Row:
        """Measures one subject. ``run`` returns the figure, and is called once more beforehand to warm up."""
        values = self.turns({subject: run}, setting, repetitions)[subject]
        return self.measured(subject=subject, setting=setting, metric=metric, unit=unit, values=values, better=better)

    def measured(
        self,
        *,
        subject: str,
        setting: str,
        metric: str,
        unit: str,
        values: Sequence[float],
        better: Literal["higher", "lower"] = "higher",
    ) -> Row:
        """A row of what one subject gave, one figure a repetition."""
        return self.row(
            subject=subject,
            setting=setting,
            metric=metric,
            unit=unit,
            better=better,
            repetitions=len(values),
            **_spread("value", values, prefix=""),
        )

    def compare(
        self,
        *,
        subject: str,
        peer: str,
        setting: str,
        metric: str,
        unit: str,
        run: Run,
        peer_run: Run,
        better: Literal["higher", "lower"] = "higher",
        repetitions: int = 5,
        papers: Sequence[int] = (),
        claim: Literal["gain", "parity"] = "gain",
    ) -> Row:
        """Measures a subject and its peer in turn (A B A B ...), so that drift of the machine falls on both alike.

        ``run`` and ``peer_run`` return the figure; each is called once more beforehand to warm up. The ratio is the
        median over the pairs of neighbouring repetitions, not the ratio of the medians.

        Raises:
            PenstockError: the peer's figure is zero.
        """
        values = self.turns({subject: run, peer: peer_run}, setting, repetitions)
        return self.compared(
            subject=subject,
            peer=peer,
            setting=setting,
            metric=metric,
            unit=unit,
            values=values[subject],
            peer_values=values[peer],
            better=better,
            papers=papers,
            claim=claim,
        )

    def turns(
        self, runs: Mapping[str, Callable[[], T]], setting: str, repetitions: int, uncounted: int = 1
    ) -> dict[str, list[T]]:
        """What each run gave over ``repetitions`` rounds in which all take their turn, after rounds that warm them up
        and are not counted. For runs that give several figures; :meth:`compared` makes rows of them."""
        rounds = min(repetitions, QUICK_REPETITIONS) if self.quick else repetitions
        values: dict[str, list[T]] = {name: [] for name in runs}
        count, done = len(runs) * (rounds + uncounted), 0
        with self.console.status("") as status:
            for number in range(1 - uncounted, rounds + 1):
                what = f"repetition {number} of {rounds}" if number > 0 else "warm-up"
                for name, run in runs.items():
                    status.update(f"{self.name}: {name}, {setting}: {what}")
                    begun = time.perf_counter()
                    values[name].append(run())
                    done, took = done + 1, time.perf_counter() - begun
                    if took > LONG:
                        told = f"{self.name}: {name}, {what}: {duration(took)}, run {done} of {count}"
                        self.console.print(Text(told), style="dim")
        return {name: kept[uncounted:] for name, kept in values.items()}

    def compared(
        self,
        *,
        subject: str,
        peer: str,
        setting: str,
        metric: str,
        unit: str,
        values: Sequence[float],
        peer_values: Sequence[float],
        better: Literal["higher", "lower"] = "higher",
        papers: Sequence[int] = (),
        claim: Literal["gain", "parity"] = "gain",
        least: float | None = None,
        note: str | None = None,
    ) -> Row:
        """A row of what a subject and its peer gave in turn, one figure a repetition.

        Raises:
            PenstockError: a figure of the peer's is zero.
        """
        if 0 in peer_values:
            raise PenstockError(f"the benchmark {self.name!r} measured a {metric} of zero for {peer!r} ({setting})")
        ratios = [value / peer_value for value, peer_value in zip(values, peer_values, strict=True)]
        return self.row(
            subject=subject,
            setting=setting,
            metric=metric,
            unit=unit,
            better=better,
            papers=tuple(papers),
            claim=claim,
            least=least,
            note=note,
            repetitions=len(values),
            peer=peer,
            **_spread("value", values, prefix=""),
            **_spread("peer_value", peer_values, prefix="peer_"),
            **_spread("ratio", ratios, prefix="ratio_"),
        )

    def result(self) -> Result:
        """All rows, with what they were measured on.

        Raises:
            PenstockError: there is no row.
        """
        from penstock.core.devices import label

        if not self.rows:
            raise PenstockError(f"the benchmark {self.name!r} measured nothing")
        return Result(
            name=self.name,
            device=label(self.device),
            hardware=hardware(self.device),
            date=datetime.datetime.now(datetime.UTC).date(),
            versions=versions(),
            commit=commit(),
            quick=self.quick,
            rows=tuple(self.rows),
        )

    def finish(self) -> Result:
        """Prints the table and writes the result."""
        result = self.result()
        Console().print(render(result))
        if (out := self._target()) is not None:
            self._write(out)
            _partial(out).unlink(missing_ok=True)
            self.console.print(Text(f"written to {out}"))
        return result

    def _target(self) -> Path | None:
        """Where the result is to be written; None where it is not."""
        from penstock.core.devices import label

        folder = results_folder()
        if self._out is not None or self.quick or folder is None:
            return self._out
        return folder / f"{self.name}-{label(self.device)}.json"

    def _write(self, path: Path) -> None:
        write_json(path, self.result().model_dump(mode="json", exclude_none=True))


def _partial(out: Path) -> Path:
    """Where rows are until all are there; no name that :func:`read_results` would read."""
    return out.with_name(f"{out.name}.partial")


def _spread(name: str, values: Sequence[float], *, prefix: str) -> dict[str, float]:
    return {name: statistics.median(values), f"{prefix}low": min(values), f"{prefix}high": max(values)}


def render(result: Result) -> Table:
    """A result as a table for the terminal."""
    title = f"{result.name} on {result.hardware}" + (" (quick: not a measurement)" if result.quick else "")
    table = Table(title=Text(title), caption=Text(f"{result.date}, commit {result.commit}"))
    for heading in HEADINGS:
        table.add_column(heading)
    for row in result.rows:
        table.add_row(*(Text(cell) for cell in cells(row)))
    return table


def versions() -> dict[str, str]:
    """The version of Python and of each of :data:`PACKAGES` that is installed, and which build of PyTorch."""
    import torch

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, "torch": torch.__version__}  # the metadata leave out what it was built for


def commit() -> str:
    """The commit of the source tree, with ``-dirty`` where tracked files have changed; ``unknown`` without git.

    Where the source is a copy without its ``.git``, the variable ``PENSTOCK_COMMIT`` says.
    """
    given = os.environ.get("PENSTOCK_COMMIT")
    if given:
        return given
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=repository(),
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def hardware(device: torch.device) -> str:
    """The full name of a device: the processor, its threads and its kind, or the GPU and its memory."""
    import torch

    from penstock.core.processor import kind, processor

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"{processor()}, {torch.get_num_threads()} threads, {kind()}"


def scripts() -> dict[str, Path]:
    """The benchmarks of the source tree by name.

    Raises:
        UsageError: Penstock was installed without its source tree.
    """
    root = repository()
    if root is None:
        raise UsageError(
            "the benchmarks are scripts of the source tree, and this installation has none",
            hint="Clone the repository and run penstock bench there.",
        )
    return {path.stem: path for path in sorted((root / "bench").glob("*.py"))}


def summary(path: Path) -> str:
    """First line of a script's docstring, read without running it."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))) or ""
    return text.partition("\n")[0]


def peer_python(peer: str, variable: str) -> str:
    """The Python that a ``peer`` lies in which has a place of its own, as the environment's ``variable`` says.

    Raises:
        UsageError: it says nothing.
    """
    python = os.environ.get(variable)
    if python is None:
        raise UsageError(
            f"there is no {peer} to stand beside",
            hint=f"Install it in a place of its own, and set {variable} to its Python; the script says how.",
        )
    return python


class LateError(PenstockError):
    """A peer took longer to answer than it was given."""


class Apart:
    """A process that answers each line of JSON on its standard input with one on its standard output.

    A context: the process ends with the block, and with it all that it has started. Once it has answered, all of them
    stand still until it is asked again, so that none spins beside what is measured here.

    Args:
        command: that starts it.
        who: what messages call it.
    """

    def __init__(self, command: Sequence[str], who: str) -> None:
        self._who, self._complaints = who, tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the block)
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._complaints}
        self._process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._signal(signal.SIGKILL)
        self._process.communicate()
        self._complaints.close()

    def ask(self, asked: Mapping[str, Any], within: float | None = None) -> dict[str, Any]:
        """What it answers.

        Args:
            asked: what is written to it.
            within: for how many seconds to wait; None waits for as long as it takes.

        Raises:
            PenstockError: it has ended.
            LateError: it has not answered in that time, and is good for nothing more.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # then it does not answer either
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        # It writes nothing before it is asked, so that none of its answer is in our buffer yet.
        if within is not None and not select.select([self._process.stdout], [], [], within)[0]:
            raise LateError(f"{self._who} did not answer in {within:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._complaints.seek(0)
            said = self._complaints.read().strip().splitlines() or ["without a word"]
            raise PenstockError(f"{self._who} failed: {said[-1]}")
        self._signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _signal(self, what: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended, and has left none
            os.killpg(self._process.pid, what)


def load(name: str) -> ModuleType:
    """Imports the script of the benchmark ``name``.

    Raises:
        UsageError: there is none, or it has no ``main``; the message names the nearest or all.
    """
    known = scripts()
    if name not in known:
        raise UsageError(f"there is no benchmark {name!r}: {nearest(name, known)}")
    spec = importlib.util.spec_from_file_location(f"bench_{name}", known[name])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    if not hasattr(module, "main"):
        raise UsageError(f"{known[name]} has no function main(bench)")
    return module
