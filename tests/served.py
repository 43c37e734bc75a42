"""A real ``penstock serve`` for tests, and what to ask of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from programs import start

MODEL = "python-1m"
SMALL = ("--set", "sequences=8", "--set", "tokens=256", "--set", "cache_tokens=8192", "--set", "check=true")


class Served:
    """A server on a free loopback port; ends with the ``with`` block."""

    def __init__(self, *arguments: str, key: str | None = None) -> None:
        given = {"PENSTOCK_API_KEY": key} if key else {}
        self.process = start("serve", MODEL, "--port", 0, *SMALL, *arguments, **given)
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
    def engine(self) -> int:
        """The id of the engine's process."""
        (child,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(child)

    def said(self) -> str:
        """What it wrote to standard error."""
        return self.process.errors()

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def figures(self) -> dict[str, float]:
        """What /metrics says, without the prefix."""
        lines = [line for line in self.http.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name.removeprefix("penstock_"): float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def until(self, true: Callable[[dict[str, float]], bool], seconds: float = 30) -> dict[str, float]:
        """The figures once something is true of them."""
        end = time.monotonic() + seconds
        while not true(now := self.figures()):
            assert time.monotonic() < end, f"the figures stayed {now}"
            time.sleep(0.02)
        return now

    def until_idle(self) -> dict[str, float]:
        """The figures once nothing runs, waits or holds a block."""
        return self.until(lambda now: not (now["running"] or now["waiting"] or now["cache_blocks_held"]))


def alive(process: int) -> bool:
    """Whether a process of this id runs (one that only waits to be buried does not)."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
