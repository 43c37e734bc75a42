"""A real ``penstock serve`` for tests, and what to ask of it."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import torch

from penstock.models import hub
from penstock.models.decoder import Layer
from penstock.serve.link import follower, process, starting
from penstock.serve.ranks import group
from programs import ENVIRONMENT, Program, run_penstock

MODEL = "python-1m"
SMALL = ("--set", "sequences=8", "--set", "tokens=256", "--set", "cache_tokens=8192", "--set", "check=true")


class Forked:
    """The process of an engine, or of a rank, forked from the one that would start it, which has imported what it
    needs; to that one it is a :class:`subprocess.Popen`.

    Args:
        main: what it runs.
        session: whether it has a session of its own.
        end: the file descriptor that it is given.
        environment: variables of it, beside those of this one.
    """

    def __init__(
        self, main: Callable[[], None], session: bool, end: int, environment: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            os.environ.update(environment)
            self._begin(main, session, end)
        self._status: int | None = None

    def _begin(self, main: Callable[[], None], session: bool, end: int) -> None:
        """As a new process is, with nothing open but ``end`` and the standard files."""
        status = 1
        try:
            if session:
                os.setsid()
            os.closerange(3, end)
            os.closerange(end + 1, os.sysconf("SC_OPEN_MAX"))
            signal.set_wakeup_fd(-1)
            sys.argv = [main.__module__, str(end)]
            main()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def wait(self, timeout: float | None = None) -> int:
        until = None if timeout is None else time.monotonic() + timeout
        while self._status is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self._status = os.waitstatus_to_exitcode(status)
            elif until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired("the process", timeout or 0)
            else:
                time.sleep(0.005)
        return self._status

    def kill(self) -> None:
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)


def serve_with_a_forked_engine(*arguments: str) -> None:
    """What a process runs that is ``penstock serve``."""
    if "--replicas" in arguments:
        # A fork amidst a thread that imports would wait for it: what the later ones are started beside is there before.
        tokenizer = hub.load_tokenizer(hub.resolve(arguments[0]))
        hub.load_tokenizer = lambda folder: tokenizer
    starting.start = functools.partial(Forked, process.main, True)  # type: ignore[assignment]
    group.start = functools.partial(Forked, follower.main, False)  # type: ignore[assignment]
    run_penstock("serve", *arguments)


def serve_with_a_failing_rank(rank: int, *arguments: str) -> None:
    """What a process runs that is ``penstock serve``: a layer in the engines' processes of this ``rank`` raises amid a
    step, once requests are under way."""
    true, calls = Layer.attend, 0

    def fails(self: Layer, *given: Any, **options: Any) -> Any:
        nonlocal calls
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == rank:
            calls += 1
            if calls == 51:
                raise ValueError("a bad shape")
        return true(self, *given, **options)

    Layer.attend = fails  # type: ignore[method-assign]
    serve_with_a_forked_engine(*arguments)


class Served:
    """A server on a free loopback port; ends with the ``with`` block.

    Its engine is a fork of it, for which PyTorch need not be imported anew, unless it is to be started ``as_shipped``;
    what runs then is ``forking``.
    """

    def __init__(
        self,
        *arguments: str,
        model: str = MODEL,
        key: str | None = None,
        as_shipped: bool = False,
        forking: Callable[..., None] = serve_with_a_forked_engine,
    ) -> None:
        given = ENVIRONMENT | ({"PENSTOCK_API_KEY": key} if key else {})
        line = (model, "--port", "0", *SMALL, *arguments)
        run = functools.partial(run_penstock, "serve") if as_shipped else forking
        self.process = Program(run, *line, environment=given)
        while "\nTry: " not in self.process.out() and self.process.poll() is None:
            time.sleep(0.01)
        self.greeting = self.process.out()
        found = re.search(r"http://\S+", self.greeting)
        assert found, self.said()
        self.url = found[0]
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=120)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    @property
    def engines(self) -> list[int]:
        """The ids of the engines' processes, replica by replica."""
        return [each["process"] for each in self.http.get("/replicas").json()["replicas"]]

    @property
    def engine(self) -> int:
        """The id of the engine's process."""
        (child,) = children(self.process.pid)
        return child

    def said(self) -> str:
        """What it wrote to standard error."""
        return self.process.errors()

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def figures(self) -> dict[str, float]:
        """What /metrics says, without the prefix."""
        lines = [line for line in self.http.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name.removeprefix("penstock_"): float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def until(self, true: Callable[[dict[str, float]], bool], seconds: float = 120) -> dict[str, float]:
        """The figures once something is true of them."""
        end = time.monotonic() + seconds
        while not true(now := self.figures()):
            assert time.monotonic() < end, f"the figures stayed {now}"
            time.sleep(0.02)
        return now

    def until_idle(self) -> dict[str, float]:
        """The figures once nothing runs, waits or holds a block."""
        return self.until(lambda now: not (now["running"] or now["waiting"] or now["cache_blocks_held"]))


def children(process: int) -> list[int]:
    """The processes that the main thread of ``process`` has started, in order."""
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def alive(process: int) -> bool:
    """Whether a process of this id runs (one that only waits to be buried does not)."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
