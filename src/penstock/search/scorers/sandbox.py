"""Runs code that nobody trusts, in processes that are limited and cut off as far as the machine can do it.

There are four grades, the best that works here is taken, which is found out by running something in it:

- ``bubblewrap``: no network; no other processes to see; of the file system, the system's programs and libraries and
  this Python alone, read only, beside a small /tmp and /dev/shm in memory; no further user namespaces; every process
  ends with the sandbox.
- ``namespaces`` (``unshare`` of util-linux): no network; no other processes to see; every process ends with the
  sandbox. Files can be read, written where the user may write, and sockets among them spoken to.
- ``namespaces-without-proc``, where the machine lets nobody mount a /proc: the same, but other processes can be seen,
  with what they were begun with; their environment and memory cannot, and they cannot be signalled.
- ``limits``: neither. The network, the user's files and the user's processes are open to the code, and a process that
  leaves its session and begins others faster than they are ended outlives the sandbox.

Where the user is root, each is tried as the user nobody first, who has to be able to run this Python.

In each of them, limits hold for processor and wall time, for the memory of a process, for the size of a file, for open
files, and, unless the user is root, for the number of processes; and, in all but ``namespaces-without-proc``, for the
memory and the number of all processes of a text, at which is looked twenty times a second. When memory is short, the
kernel ends texts before anything else. A text has no capabilities, root's neither, with which it could take off the
/proc that hides others. Processes that it leaves behind are ended before the next one; a sandbox of bubblewrap whose
files in memory, or System V shared memory, are not as they were is not used again. What is not contained in any of
them: memory that no process has mapped, such as System V's, and a text that knows the harness can forge its own score.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, PositiveInt

from penstock.core.config import Config
from penstock.search.scorers.contract import Verdict

HARNESS = Path(__file__).with_name("harness.py")

#: Bytes that a sandbox may say about one text.
MOST_SAID = 4096


class Limits(Config):
    """What a text may take.

    Attributes:
        seconds: of wall time; of processor time one more.
        memory: bytes that a process can address, and all of a text's processes together may hold.
        file: bytes of the largest file, and of all files where bubblewrap contains them.
        processes: of the user, where the user is not root, and of a text.
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
    found: list[Verdict] = []
    while len(found) < len(texts):
        given = {
            "kind": kind,
            "source": source,
            "problem": dict(problem),
            "texts": list(texts[len(found) :]),
            "limits": limits.model_dump(),
            "scratch": SCRATCH if containment().grade == "bubblewrap" else [],
        }
        most = MOST_SAID * (len(texts) - len(found))
        said = _run(containment().command(limits), json.dumps(given).encode(), limits.seconds + 10, most).splitlines()
        # A sandbox that ends behind some texts is not to be used again; one that ends before, has its first text ended.
        found += list(map(_verdict, said)) or [Verdict.failure("the sandbox ended before it was scored")]
    return found[: len(texts)]


def _verdict(line: bytes) -> Verdict:
    with contextlib.suppress(ValueError):
        said = json.loads(line)
        if isinstance(said, int | float):
            return Verdict(float(said)) if -1e308 < said < 1e308 else Verdict.failure(f"the score is {said}")
        if isinstance(said, str):
            return Verdict.failure(said)
    return Verdict.failure("the sandbox said nothing that can be read")


def _run(command: Sequence[str], given: bytes, seconds: float, most: int) -> bytes:
    """The first ``most`` bytes that ``command`` says of what it was ``given``, until it is silent for so many
    ``seconds``. Nothing of it is left."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=_environment(),
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
                said, ends = said + part, time.monotonic() + seconds
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


def _environment() -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "OMP_NUM_THREADS": "1"}


#: What Python is made of, where it is there, beside its own folder.
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache")

#: Where a text may write in bubblewrap.
SCRATCH = ("/tmp", "/dev/shm")

#: Begins a program as the user nobody.
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")


@dataclasses.dataclass(frozen=True)
class Containment:
    """What stands around the texts.

    Attributes:
        grade: its name.
        nobody: whether root's texts are run by the user nobody.
        lacking: why it is not a better one, in the words of what failed; nothing where it is the best.
    """

    grade: str
    nobody: bool = False
    lacking: str = ""

    def __str__(self) -> str:
        return f"{self.grade} only ({self.lacking})" if self.lacking else self.grade

    def command(self, limits: Limits) -> list[str]:
        """Begins the harness in it. The program is an argument: there may be no file that it could be read from."""
        python = [os.path.realpath(sys.executable), "-I", "-S", "-c", HARNESS.read_text(encoding="utf-8")]
        mapped = () if os.geteuid() == 0 and not self.nobody else ("--user", "--map-current-user")
        unshare = ["unshare", "--net", "--ipc", "--pid", "--fork", "--kill-child=KILL", *mapped]
        before = {
            "bubblewrap": _bubblewrap(limits),
            "namespaces": [*unshare, "--mount-proc", "--"],
            "namespaces-without-proc": [*unshare, "--"],
            "limits": [],
        }[self.grade]
        return [*(NOBODY if self.nobody else ()), *before, *python, f"harness-of-{os.getpid()}"]

    def fault(self) -> str:
        """Why it does not work here; nothing where a program was scored in it."""
        command = self.command(Limits())
        same = f"import os, sys; assert os.path.realpath(sys.base_prefix) == {os.path.realpath(sys.base_prefix)!r}"
        given = {"kind": "tests", "source": [same], "problem": {}, "texts": [""], "limits": Limits().model_dump()}
        try:
            done = subprocess.run(
                command, input=json.dumps(given), capture_output=True, text=True, timeout=10, env=_environment()
            )
        except FileNotFoundError:
            return f"{command[0]} is not installed"
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{command[0]}: {error}"[:200]
        said = done.stderr.strip().splitlines() or [f"{command[0]} does not run this Python"]
        return "" if done.stdout == "1.0\n" else said[-1][:200]


def _bubblewrap(limits: Limits) -> list[str]:
    """bwrap, with a file system that is made of what Python needs. What is named later lies upon what is before it."""
    python = os.path.realpath(sys.base_prefix)
    return [
        *("bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL"),
        *("--as-pid-1", "--die-with-parent", "--new-session"),
        *(each for folder in SYSTEM for each in ("--ro-bind-try", folder, folder)),
        # Root may write to /proc/sys without a capability, such as what the kernel runs when a program crashes.
        *("--proc", "/proc", "--ro-bind", "/proc/sys", "/proc/sys", "--dev", "/dev"),
        *(each for folder in SCRATCH for each in ("--size", str(limits.file), "--tmpfs", folder)),
        *("--ro-bind", python, python, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp", "--"),
    ]


#: Of containment, the best first.
GRADES = ("bubblewrap", "namespaces", "namespaces-without-proc", "limits")


@functools.cache
def containment() -> Containment:
    """The best that works on this machine."""
    lacking = ""
    for grade in GRADES:
        for nobody in (True, False) if os.geteuid() == 0 else (False,):
            each = Containment(grade, nobody, lacking)
            fault = each.fault()
            if not fault:
                return each
        lacking = lacking or fault
    return Containment("limits", lacking=lacking)


def told(policies: Iterable[type[BaseModel]]) -> list[str]:
    """A line on what contains the code that any of these ``policies`` runs, which are those that have ``limits``."""
    if any("limits" in each.model_fields for each in policies):
        return [f"code is contained by {containment()}; docs/search.md says what that holds back"]
    return []
