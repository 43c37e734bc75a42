"""Runs in the sandbox: scores one text after the other, each in a process of its own. It imports nothing of Penstock.

It reads one JSON object from standard input: ``kind``, ``source``, ``problem``, ``texts``, limits and, if there are
any, the folders that texts may write to (``scratch``); and writes a line of JSON for each text: a number, or a reason
why there is none. It ends before the last text where one has left something that the next would meet.

Where it is the first process of its namespace, no text can signal it; elsewhere one can end it, and others go on in
another sandbox.
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
from pathlib import Path
from typing import Any

PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 4, 24, 36, 38

#: Seconds between two looks at what a text's processes hold.
GLANCE = 0.05


def controlled(what: int, value: int) -> None:
    """Calls prctl."""
    ctypes.CDLL(None).prctl(what, value, 0, 0, 0)


def powerless() -> None:
    """Takes this process's capabilities, for good: with root's, it could unmount the /proc that hides others."""
    for capability in range(64):
        controlled(PR_CAPBSET_DROP, capability)  # none comes back with a new program
    controlled(PR_SET_NO_NEW_PRIVS, 1)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, of this process
    system = ctypes.CDLL(None, use_errno=True)
    if system.capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "the capabilities cannot be given up")


def offspring(most: int) -> list[int]:
    """Processes that come of this one: all, or more than ``most``; none where there is no /proc of its namespace."""
    found = [os.getpid()]
    with contextlib.suppress(OSError):
        if Path("/proc/self").readlink() != Path(str(found[0])):
            return []
    for each in found:  # which grows
        for path in Path(f"/proc/{each}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, path.read_text().split())
        if len(found) > most + 1:
            break
    return found[1:]


def held(process: int) -> int:
    """Bytes of memory that a process holds, of those that it shares its part."""
    folder = Path(f"/proc/{process}")
    try:
        lines = (folder / "smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    except PermissionError:  # it does not let itself be read
        return int((folder / "statm").read_text().split()[1]) * resource.getpagesize()


def excess(limits: dict[str, Any]) -> str:
    """What a text's processes have too much of together."""
    processes, memory = offspring(limits["processes"]), 0
    if len(processes) > limits["processes"]:
        return f"it has more than {limits['processes']} processes"
    for each in processes:
        with contextlib.suppress(OSError):
            memory += held(each)
    return f"its processes hold more than {limits['memory']} bytes" if memory > limits["memory"] else ""


def ended() -> bool:
    """Ends whatever a text has begun, and says whether nothing is left."""
    for _ in range(1000):
        for each in [-1] if os.getpid() == 1 else offspring(1000):
            with contextlib.suppress(OSError):
                os.kill(each, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return True
        time.sleep(0.001)
    return False


def room(folders: list[str]) -> list[Any]:
    """What is free in ``folders``, in blocks and in files, and what there is of System V's shared memory beside them,
    which is not of this namespace where there are no folders."""
    shared = [Path("/proc/sysvipc", kind).read_text() for kind in ("shm", "sem", "msg") if folders]
    return shared + [(state.f_bfree, state.f_ffree) for state in map(os.statvfs, folders)]


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
        controlled(PR_SET_DUMPABLE, 1)  # what it holds of memory can be read
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")  # it goes before who began it
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
    limits = given["limits"]
    heard, ends = b"", time.monotonic() + limits["seconds"]
    failure = f"it took more than {limits['seconds']:g} s"
    while (left := ends - time.monotonic()) > 0:
        if not select.select([into], [], [], min(left, GLANCE))[0]:
            if sys.platform == "linux" and (too_much := excess(limits)):
                failure = too_much
                break
            continue
        part = os.read(into, 4096)
        heard += part
        if not part or len(heard) > 4096 or heard[-1:] in b'"0123456789Ny':  # its end, or a whole value
            failure = ""
            break
    os.close(into)
    with contextlib.suppress(OSError):
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(OSError):
        os.kill(child, signal.SIGKILL)
    if failure:
        return failure
    try:
        return json.loads(heard)
    except ValueError:
        return "it ended without a score: it was killed, or ran out of memory"


def main() -> None:
    """Scores what standard input gives."""
    given = json.load(sys.stdin)
    scratch = given.get("scratch", [])
    if sys.platform == "linux":
        controlled(PR_SET_DUMPABLE, 0)  # no text reads its memory or its files
        controlled(PR_SET_CHILD_SUBREAPER, 1)  # what leaves its session comes here
    clean = room(scratch)
    for text in given["texts"]:
        said = watched(given, text)
        over = ended()
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()
        if not over or room(scratch) != clean:
            break


if __name__ == "__main__":
    main()
