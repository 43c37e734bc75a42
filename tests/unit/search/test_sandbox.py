"""The sandbox as who wants out of it finds it: what a text reaches of the machine, in every grade that works here."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from penstock.search.scorers import sandbox
from penstock.search.scorers.contract import Candidate, verdicts
from penstock.search.scorers.sandbox import GRADES, Containment, Limits, containment, sandboxed
from penstock.search.scorers.unit_tests import UnitTests

FAULTS = {grade: Containment(grade).fault() for grade in GRADES}

#: Grades that hide something, as in the table of docs/search.md.
BEHIND_WALLS = {"bubblewrap"}
OWN_PROC = {"bubblewrap", "namespaces"}
OWN_PROCESSES = {"bubblewrap", "namespaces", "namespaces-without-proc"}

#: Whether the number of a user's processes is limited.
COUNTED = os.geteuid() != 0


@pytest.fixture(params=GRADES)
def grade(request, monkeypatch):
    """Each grade that works here, for whatever is scored in the test."""
    if FAULTS[request.param]:
        pytest.skip(f"{request.param} does not work here: {FAULTS[request.param]}")
    monkeypatch.setattr(sandbox, "containment", lambda: Containment(request.param))
    return request.param


@pytest.fixture
def bubblewrap():
    """Where it works, it is what is in force."""
    if FAULTS["bubblewrap"]:
        pytest.skip(f"bubblewrap does not work here: {FAULTS['bubblewrap']}")


def attacked(attack, limits=None, **problem):
    """What the body of ``attack``, a function of ``problem``, comes back with."""
    lines = "\n    ".join(["import ctypes, os, signal, socket, subprocess, sys, time", *attack.strip().splitlines()])
    (found,) = sandboxed("function", f"def score(problem, text):\n    {lines}\n", problem, [""], limits or Limits())
    assert found.error is None, found.error
    return found.score


def alive(mark):
    """Whether a process of this machine has ``mark`` among its arguments."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                return True
        except OSError:
            continue
    return False


def test_the_best_grade_that_works_is_taken():
    assert containment().grade == next(grade for grade in GRADES if not FAULTS[grade])
    assert not containment().lacking or containment().grade != GRADES[0]


CONNECT = """
with socket.socket(problem["family"]) as each:
    return each.connect_ex(tuple(problem["to"]) if isinstance(problem["to"], list) else problem["to"]) == 0
"""


def test_the_network_is_out_of_reach(grade):
    with socket.create_server(("127.0.0.1", 0)) as server:
        reached = attacked(CONNECT, family=socket.AF_INET.value, to=list(server.getsockname()))
    assert reached == (grade not in OWN_PROCESSES)


def test_a_socket_among_the_files_is_out_of_reach(grade, tmp_path):
    """Such as that of an agent with keys, or of who starts containers."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "agent"))
        server.listen()
        reached = attacked(CONNECT, family=socket.AF_UNIX.value, to=str(tmp_path / "agent"))
    assert reached == (grade not in BEHIND_WALLS)


def test_files_of_others_are_neither_read_nor_written(grade, tmp_path):
    """The same through the root of every process that it can see, where /proc would lead around the walls."""
    (tmp_path / "secret").write_text("x")
    paths = [str(tmp_path / "secret"), "/etc/passwd", str(Path(__file__))]
    read = """
read = 0
for root in ["", *(f"/proc/{each}/root" for each in os.listdir("/proc") if each.isdigit())]:
    for path in problem["paths"]:
        try:
            read += bool(open(root + path).read())
        except OSError:
            pass
return read
"""
    write = """
try:
    open(problem["path"], "w").write("x")
except OSError:
    return 0
return 1
"""
    found, written = attacked(read, paths=paths), attacked(write, path=str(tmp_path / "new"))
    assert (found > 0, written, (tmp_path / "new").exists()) == ((grade not in BEHIND_WALLS,) * 3)


@pytest.mark.parametrize("folder", ["home", "/usr", "/", "/dev", "/proc/sys/kernel", os.path.realpath(sys.base_prefix)])
def test_the_walls_cannot_be_written_to(bubblewrap, folder):
    """Nor the kernel's settings, which belong to root, whatever it has given up: they are opened, and not changed."""
    path = str(Path.home() if folder == "home" else folder)
    write = """
for name in (".written", "core_pattern", "modprobe"):
    try:
        path = os.path.join(problem["path"], name)
        os.close(os.open(path, os.O_WRONLY | (0 if path.startswith("/proc") else os.O_CREAT)))
        return 1
    except OSError:
        pass
return 0
"""
    assert attacked(write, path=path) == 0
    assert not Path(path, ".written").exists()


def test_no_processes_but_its_own_are_seen(grade):
    look = """
seen = 0
for each in filter(str.isdigit, os.listdir("/proc")):
    try:
        said = open(f"/proc/{each}/cmdline", "rb").read()
    except OSError:
        continue
    seen += bool(said) and b"harness-of" not in said
return seen
"""
    assert (attacked(look) > 0) == (grade not in OWN_PROC)


def test_the_environment_holds_no_secrets(grade):
    """Nor do those of other processes, where these are hidden."""
    with subprocess.Popen(["sleep", "60"], env={**os.environ, "SECRET_KEY": "sesame"}) as holder:
        read = """
found = "sesame" in str(os.environ)
for each in filter(str.isdigit, os.listdir("/proc")):
    try:
        found = found or b"sesame" in open(f"/proc/{each}/environ", "rb").read()
    except OSError:
        pass
return found
"""
        found = attacked(read)
        holder.kill()
    # Root's cannot be read without its capabilities, nor anybody's from another user namespace.
    assert found == (grade == "limits" and os.geteuid() != 0)


def test_it_has_no_capabilities_and_gets_none(grade):
    """A program that it begins has none either, which is where root's would come back."""
    look = """
said = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True).stdout
lines = dict(line.split(":", 1) for line in said.splitlines())
return int(lines["CapEff"], 16) | int(lines["CapPrm"], 16)
"""
    assert attacked(look) == 0
    again = "return ctypes.CDLL(None).unshare(0x10000000) == 0"  # CLONE_NEWUSER, in which it would have all
    assert grade not in BEHIND_WALLS or attacked(again) == 0


def test_what_judges_it_cannot_be_read(grade):
    """Its memory and its files would let a text write what others are worth."""
    look = """
opened = 0
for what in ("mem", "fd/1", "environ"):
    try:
        os.close(os.open(f"/proc/{os.getppid()}/{what}", os.O_WRONLY if what == "mem" else os.O_RDONLY))
        opened += 1
    except OSError:
        pass
return opened or ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0
"""
    assert attacked(look) == 0


KILLERS = {
    "what judges it": "os.kill(os.getppid(), 9)",
    "all": "os.kill(-1, 9)",
    "what judges it, to sleep": "os.kill(os.getppid(), 19)",
    "the group of what judges it": "os.killpg(os.getpgid(os.getppid()), 9)",
}


@pytest.mark.parametrize("whom", KILLERS)
def test_who_kills_others_fails_alone(grade, whom):
    if whom != "what judges it" and grade not in OWN_PROCESSES:
        pytest.skip("the machine's own processes would be signalled")
    found = sandboxed("tests", ["x"], {}, ["x = 1", f"import os\n{KILLERS[whom]}\ny = 1", "x = 1"], Limits(seconds=0.5))
    assert [each.score for each in found] == [1, 0, 1]
    assert found[0].error is None and found[2].error is None


def test_nothing_that_it_began_is_left(grade):
    """A process that has left its session is gone when the next text comes, and when all have been."""
    mark = f"{time.time_ns() / 1e9:.7f}"
    flee = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execvp("sleep", ["sleep", "{mark}"])
    os._exit(0)
os.wait()
time.sleep(0.1)
left = 0
"""
    look = f"""
import glob
left = sum(b"{mark}" in open(path, "rb").read().split(b"\\0") for path in glob.glob("/proc/[0-9]*/cmdline"))
"""
    found = sandboxed("tests", ["assert left == 0"], {}, [flee, look], Limits())
    assert [each.score for each in found] == [1, 1] and not alive(mark.encode())


def test_a_fork_bomb_goes_off_alone(grade):
    """By its number, or when that is seen; where nobody counts, it ends with its text."""
    mark = f"{time.time_ns() / 1e9:.7f}"
    bomb = f"""
import os, time
for _ in range(400):
    if os.fork() == 0:
        os.execvp("sleep", ["sleep", "{mark}"])
time.sleep(0.5)
"""
    bombed, after = sandboxed("tests", [""], {}, [bomb, "x = 1"], Limits(processes=64))
    if grade != "namespaces-without-proc" or COUNTED:
        assert bombed.score == 0
    if bombed.error is not None:
        assert bombed.error == "it has more than 64 processes"
    assert after.score == 1 and not alive(mark.encode())


def test_memory_ends_for_one_process_and_for_all_together(grade):
    one = "try:\n    x = len(b'x' * (1 << 29))\nexcept MemoryError:\n    x = 0"
    many = """
import os, time
for _ in range(5):
    if os.fork() == 0:
        x = b"x" * (100 << 20)
        time.sleep(60)
time.sleep(60)
"""
    texts = [one, "x = 0", *([many, "x = 0"] if grade != "namespaces-without-proc" else [])]
    found = sandboxed("tests", ["assert x == 0"], {}, texts, Limits(memory=1 << 28, seconds=10))
    assert [each.score for each in found] == [1, 1, 0, 1][: len(texts)]
    assert {each.error for each in found[2:3]} <= {"its processes hold more than 268435456 bytes"}


def test_files_in_memory_end_too_and_the_next_text_finds_none(bubblewrap):
    fill = """
import os
written = 0
for folder in ("/tmp", "/dev/shm"):
    os.makedirs(folder + "/a/b")
    os.chmod(folder + "/a", 0o700)
    try:
        for number in range(1000):
            written += open(f"{folder}/a/b/{number}", "wb", 0).write(b"x" * (1 << 16))
    except OSError:
        pass
    os.chmod(folder + "/a", 0)
x = written
"""
    empty = "import os\nx = len(os.listdir('/tmp') + os.listdir('/dev/shm'))"
    tests = ["assert x <= 2 << 20", "assert x > 1 << 20", "assert x == 0"]
    found = sandboxed("tests", tests, {}, [fill, empty, empty], Limits(file=1 << 20))
    assert [round(3 * each.score) for each in found] == [2, 2, 2] and all(each.error is None for each in found)
    segment = "import ctypes\nx = ctypes.CDLL(None).shmget(77, 1 << 16, {}) >= 0"
    found = sandboxed("tests", ["assert x"], {}, [segment.format("0o1600"), segment.format("0")], Limits())
    assert [each.score for each in found] == [1, 0]


def test_output_without_end_reaches_nobody(grade):
    flood = """
import os
os.set_blocking(1, False)
for file in range(64):
    try:
        for _ in range(20):
            os.write(file, b"1\\n" * 50_000)
    except OSError:
        pass
"""
    found = sandboxed("tests", ["x"], {}, ["x = 1", flood, "x = 1"], Limits(seconds=1))
    assert [each.score for each in found] == [1, 0, 1]


def test_programs_that_hang_take_no_time_from_others():
    """Five of them take longer than one text may; the right one behind them is scored."""
    hanging, right = "import time\ntime.sleep(60)", "def add(a, b):\n    return a + b"
    scorer = UnitTests(limits=Limits(seconds=0.5))
    given = [Candidate(text, "") for text in [hanging] * 5 + [right]]
    found = verdicts(scorer.score, {"tests": ["assert add(1, 2) == 3"]}, given, 2.0)
    assert [each.error for each in found] == ["it took more than 0.5 s"] * 5 + [None] and found[-1].score == 1


def test_who_heeds_no_signal_is_ended(grade):
    deaf = """
import signal
for each in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(each, signal.SIG_IGN)
while True:
    pass
"""
    found = sandboxed("tests", ["x"], {}, [deaf, "x = 1"], Limits(seconds=0.3))
    assert [each.error for each in found] == ["it took more than 0.3 s", None] and found[1].score == 1


def test_it_ends_with_the_program_that_began_it(bubblewrap):
    """Which may be killed at any time; elsewhere a text that it was judging has its own time left."""
    mark = f"{time.time_ns() / 1e9:.7f}"
    judge = f"""
from penstock.search.scorers.sandbox import Limits, sandboxed
sandboxed("tests", [""], {{}}, ["import os\\nos.system('sleep {mark}')"], Limits(seconds=60))
"""
    with subprocess.Popen([sys.executable, "-c", judge]) as process:
        for _ in range(2000):
            if alive(mark.encode()):
                break
            time.sleep(0.01)
        else:
            pytest.fail("the text does not begin")
        process.kill()
    for _ in range(2000):
        if not alive(mark.encode()):
            return
        time.sleep(0.01)
    pytest.fail("the text goes on")


BROKEN = {
    "bwrap: No permissions to create new namespace": "echo bwrap: No permissions to create new namespace >&2; exit 1",
    "bwrap: Unknown option --disable-userns": "echo usage; echo bwrap: Unknown option --disable-userns >&2; exit 1",
    "bwrap does not run this Python": "exit 0",
}


@pytest.mark.parametrize("said", BROKEN)
def test_a_bwrap_that_does_not_work_is_passed_over_and_says_why(said, tmp_path, monkeypatch):
    (tmp_path / "bwrap").write_text(f"#!/bin/sh\n{BROKEN[said]}\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = containment.__wrapped__()
    assert found.grade == next(grade for grade in GRADES[1:] if not FAULTS[grade])
    assert str(found) == f"{found.grade} only ({said})"


def test_a_bwrap_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert str(containment.__wrapped__()) == "limits only (bwrap is not installed)"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_of_root_a_text_is_run_by_nobody_where_he_can_run_python(monkeypatch):
    """The interpreter of the system, which all may run, in place of this one, which may lie in root's own folder."""
    python = Path("/usr/bin/python3")
    if not python.exists():
        pytest.skip("the system has no Python")
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    found = containment.__wrapped__()
    monkeypatch.setattr(sandbox, "containment", lambda: found)
    assert found.nobody and attacked("return os.getuid()") == 65534
