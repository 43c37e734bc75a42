"""Programs as processes of their own, without each of them importing PyTorch anew.

They are forked from a fork of the tests' process, made before its first test, when it has imported what they need
(:func:`begin`). From there on they are what a shell starts: their own arguments, environment, folder, output, signals
and exit code. A process as a shell really starts it takes some ten seconds of a processor before it begins.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib.figure  # noqa: F401  what programs import, as what follows
import torch
import torch._dynamo
import transformers.models.auto.tokenization_auto  # noqa: F401

import penstock.serve.http.server
import penstock.train.session
from penstock import policy
from penstock.cli import build_app

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}

_CONTEXT = multiprocessing.get_context("forkserver")


def begin() -> None:
    """Sees to it that there is the process that programs are forked from: multiprocessing's fork server, in a fork of
    this process as it is now."""
    resource_tracker.ensure_running()
    with mock.patch("multiprocessing.util.spawnv_passfds", _forked):
        forkserver.ensure_running()


def _forked(python: bytes, arguments: Sequence[str], files: Sequence[int]) -> int:
    """The id of a fork of this process, which has nothing open but ``files`` and runs the code of a command line
    ``python -c code``."""
    build_app(), policy.index()  # which imports all verbs, and reads what the source declares
    child = os.fork()
    if child == 0:
        try:
            first = 3
            for file in sorted(files):
                os.closerange(first, file)
                first = file + 1
            os.closerange(first, os.sysconf("SC_OPEN_MAX"))
            exec(arguments[-1], {})
        finally:
            os._exit(1)
    return child


class Program:
    """A running function. What it writes is kept in files. It ends with the tests at the latest.

    Attributes:
        pid: its process.
    """

    def __init__(
        self,
        function: Callable[..., object],
        *arguments: object,
        environment: Mapping[str, str] = ENVIRONMENT,
        folder: Path | None = None,
    ) -> None:
        self._out, self._errors = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
        files = [DupFd(file.fileno()) for file in (self._out, self._errors)]
        place = folder or Path.cwd()
        begin()
        self._process = _CONTEXT.Process(target=_run, args=(function, arguments, dict(environment), place, files))
        self._process.start()
        atexit.register(self._process.kill)
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Its exit code once it has ended, as :mod:`subprocess` gives it."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code.

        Raises:
            subprocess.TimeoutExpired: it has not ended by then.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def out(self) -> str:
        """What it has written to standard output so far."""
        return _contents(self._out)

    def errors(self) -> str:
        """What it has written to standard error so far."""
        return _contents(self._errors)

    def completed(self, timeout: float = 280) -> subprocess.CompletedProcess[str]:
        """Waits for its end."""
        try:
            code = self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return subprocess.CompletedProcess((), code, self.out(), self.errors())


def _contents(file: Any) -> str:
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()


def _run(
    function: Callable[..., object],
    arguments: tuple[object, ...],
    environment: dict[str, str],
    folder: Path,
    files: list[DupFd],
) -> None:
    """What pytest has set up is gone, but for what was imported."""
    for file, number in zip(files, (1, 2), strict=True):
        os.dup2(file.detach(), number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.getLogger().handlers.clear()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # which OpenMP reads when it is loaded
    function(*arguments)


def run_penstock(*arguments: str) -> None:
    """What a process runs that is ``penstock``."""
    from penstock.cli import main

    sys.argv = ["penstock", *arguments]
    main()


def start(*arguments: object, folder: Path | None = None, **environment: str) -> Program:
    """Starts ``penstock``, and leaves it running."""
    return Program(run_penstock, *map(str, arguments), environment=ENVIRONMENT | environment, folder=folder)


def penstock(*arguments: object, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``penstock`` to its end."""
    return start(*arguments, folder=folder, **environment).completed()


def in_a_shell(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The same as a shell does it, with Python and all imports from the beginning: for one test of a verb."""
    command = [sys.executable, "-m", "penstock", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=280)
