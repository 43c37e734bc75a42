"""Runs code that nobody trusts, in processes that are limited and cut off as far as the machine can do it.

There are four grades, the best that works here is taken:

- ``bubblewrap``: no network; no other processes to see; the file system can be read only, and /tmp is empty; every
  process ends with the sandbox.
- ``namespaces`` (``unshare`` of util-linux): no network; no other processes to see; every process ends with the
  sandbox. Files can be read, and written where the user may write.
- ``namespaces-without-proc``, where the machine lets nobody mount a /proc: the same, but the user's other processes can
  be seen and read, with their environment; they cannot be signalled.
- ``limits``: neither. The network and the user's files are open to the code, and a process that leaves its session
  outlives the sandbox until its processor time is spent.

In each of them, limits hold for processor and wall time, for the memory of a process, for the size of a file, for open
files, and, unless the user is root, for the number of processes; and a text has no capabilities, root's neither, with
which it could take off the /proc that hides others. What is not contained: the memory of all processes together;
reading the user's files; what root may write, if the user is root; and a text that knows the harness can forge its own
score.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from penstock.core.config import Config
from penstock.search.scorers.contract import Verdict

HARNESS = Path(__file__).with_name("harness.py")

#: Bytes that a sandbox may say about one text.
MOST_SAID = 4096


class Limits(Config):
    """What a text may take.

    Attributes:
        seconds: of wall time; of processor time one more.
        memory: bytes that a process can address.
        file: bytes of the largest file.
        processes: of the user, where the user is not root.
    """

    seconds: Annotated[float, Field(gt=0, le=3600)] = 5.0
    memory: Annotated[int, Field(ge=1 << 26)] = 1 << 30
    file: PositiveInt = 1 << 24
    processes: PositiveInt = 256


def sandboxed(
    kind: str, source: Any, problem: Mapping[str, Any], texts: Sequence[str], limits: Limits
) -> list[Verdict]:
    """Verdicts on ``texts``: by the function ``score(problem, text)`` that ``source`` defines (kind ``function``), or
    by the tests ``source``, of which each is a program behind the text's (kind ``tests``)."""
    given = {
        "kind": kind,
        "source": source,
        "problem": dict(problem),
        "texts": list(texts),
        "limits": limits.model_dump(),
    }
    command = [*GRADES[grade()], sys.executable, "-I", "-S", str(HARNESS)]
    seconds = (limits.seconds + 1) * len(texts) + 10
    said = _run(command, json.dumps(given).encode(), seconds, MOST_SAID * len(texts)).splitlines()
    found = [_verdict(line) for line in said[: len(texts)]]
    return found + [Verdict.failure("the sandbox ended before it was scored")] * (len(texts) - len(found))


def _verdict(line: bytes) -> Verdict:
    with contextlib.suppress(ValueError):
        said = json.loads(line)
        if isinstance(said, int | float):
            return Verdict(float(said)) if -1e308 < said < 1e308 else Verdict.failure(f"the score is {said}")
        if isinstance(said, str):
            return Verdict.failure(said)
    return Verdict.failure("the sandbox said nothing that can be read")


def _run(command: Sequence[str], given: bytes, seconds: float, most: int) -> bytes:
    """The first ``most`` bytes that ``command`` says of what it was ``given``, within so many ``seconds``. Nothing of
    it is left."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None and process.stdout is not None
    said, ends = b"", time.monotonic() + seconds
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(given)
            process.stdin.close()
        os.set_blocking(process.stdout.fileno(), False)
        while len(said) < most and time.monotonic() < ends:
            part = process.stdout.read(most)
            if part:
                said += part
            elif part == b"" or process.poll() is not None:
                break
            else:
                time.sleep(0.002)
    finally:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        process.stdout.close()
    return said


_NAMESPACES = [
    *("unshare", "--net", "--ipc", "--pid", "--fork", "--kill-child=KILL"),
    *(() if os.geteuid() == 0 else ("--user", "--map-current-user")),
]
_BOUND = ["--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp"]

#: What stands before a command, by grade, the best first.
GRADES: dict[str, list[str]] = {
    "bubblewrap": ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", *_BOUND, "--"],
    "namespaces": [*_NAMESPACES, "--mount-proc", "--"],
    "namespaces-without-proc": [*_NAMESPACES, "--"],
    "limits": [],
}


@functools.cache
def grade() -> str:
    """The best grade that works on this machine."""
    for name, before in GRADES.items():
        if not before:
            return name
        if shutil.which(before[0]) is not None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                done = subprocess.run([*before, "true"], capture_output=True, timeout=10, check=False)
                if done.returncode == 0:
                    return name
    return "limits"
