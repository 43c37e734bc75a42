"""Runs in the sandbox: scores one text after the other, each in a process of its own. It imports nothing of Penstock.

It reads one JSON object from standard input: ``kind``, ``source``, ``problem``, ``texts`` and limits; and writes a line
of JSON for each text: a number, or a reason why there is none.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
from typing import Any


def powerless() -> None:
    """Takes this process's capabilities, for good: with root's, it could unmount the /proc that hides others."""
    system = ctypes.CDLL(None, use_errno=True)
    for capability in range(64):
        system.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP: none comes back with a new program
    system.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, of this process
    if system.capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "the capabilities cannot be given up")


def limited(limits: dict[str, Any]) -> None:
    """Limits this process and its children, for good."""
    memory, files = limits["memory"], limits["file"]
    for name, most in (
        (resource.RLIMIT_CPU, int(limits["seconds"]) + 1),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, files),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, limits["processes"]),
    ):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(name, (most, most))


def by_function(given: dict[str, Any], text: str) -> float:
    """What the user's own function says."""
    space: dict[str, Any] = {"__name__": "scorer"}
    exec(compile(given["source"], "scorer", "exec"), space)
    return float(space["score"](given["problem"], text))


def by_tests(given: dict[str, Any], text: str) -> float:
    """The share of the tests that pass behind the text, which is a program."""
    space: dict[str, Any] = {"__name__": "candidate"}
    try:
        exec(compile(text, "candidate", "exec"), space)
    except Exception:  # a program that is wrong, not one that cannot be judged
        return 0.0
    passed = 0
    for test in given["source"]:
        with contextlib.suppress(Exception):
            exec(compile(test, "test", "exec"), dict(space))
            passed += 1
    return passed / len(given["source"])


def scored(given: dict[str, Any], text: str, out: int) -> None:
    """In a process of its own: writes a score, or a reason."""
    os.setsid()
    if sys.platform == "linux":
        powerless()
    limited(given["limits"])
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    try:
        said: float | str = {"function": by_function, "tests": by_tests}[given["kind"]](given, text)
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"[:200]
    with contextlib.suppress(OSError):
        os.write(out, json.dumps(said).encode())
    os._exit(0)


def watched(given: dict[str, Any], text: str) -> Any:
    """The score of a text, or the reason why there is none."""
    into, out = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(into)
        scored(given, text, out)
    os.close(out)
    heard, ends = b"", time.monotonic() + given["limits"]["seconds"]
    late = True
    while (left := ends - time.monotonic()) > 0 and len(heard) < 4096:
        if select.select([into], [], [], left)[0]:
            part = os.read(into, 4096)
            heard += part
            if not part or heard[-1:] in b'"0123456789Ny':  # its end, or a whole value
                late = False
                break
    os.close(into)
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(OSError):
            kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if late:
        return f"it took more than {given['limits']['seconds']:g} s"
    try:
        return json.loads(heard)
    except ValueError:
        return "it ended without a score: it was killed, or ran out of memory"


def main() -> None:
    """Scores what standard input gives."""
    given = json.load(sys.stdin)
    for text in given["texts"]:
        sys.stdout.write(json.dumps(watched(given, text)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
