"""What the processor does well, asked of it or measured for a moment: the one place that knows.

No answer leans on the name of a chip: numbers of cores come from the system, precisions from products that are timed
here, and a CUDA device says its own capability. Every answer comes with its reason, for people to read.

PyTorch is imported by the functions that need it: :func:`share_cores` is of use only before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

#: How many times as fast as fp32 a product in bf16 must be before its coarser numbers are worth it.
WORTH = 1.2


@dataclasses.dataclass(frozen=True)
class Answer(Generic[T]):
    """A choice, and why it was made: half a sentence that can follow ``precision fp32:``."""

    choice: T
    reason: str


# Precision.


@functools.cache
def fast_dtype(device: torch.device) -> Answer[torch.dtype]:
    """The dtype, bf16 or fp32, in which ``device`` trains fastest.

    A CPU without bf16 instructions computes such products up to a hundred times slower than fp32: some of each are
    timed, once a process, in about 100 ms. CUDA devices have bf16 units from capability 8.0 on.
    """
    import torch

    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        dtype = torch.bfloat16 if major >= 8 else torch.float32
        return Answer(dtype, f"its CUDA capability is {major}.{minor}, and bf16 units come with 8.0")
    rates = {dtype: product_rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
    ratio = rates[torch.bfloat16] / rates[torch.float32]
    dtype = torch.bfloat16 if ratio >= WORTH else torch.float32
    fp32, bf16 = (f"{rate / 1e9:.3g}" for rate in rates.values())
    return Answer(dtype, f"products run at {bf16} GFLOP/s in bf16 and at {fp32} in fp32 here")


def product_rate(dtype: torch.dtype, size: int = 192) -> float:
    """FLOP/s of a square product on one thread of the CPU."""
    import torch

    a = torch.ones(size, size, dtype=dtype)
    return 2 * size**3 * calls_a_second(lambda: a @ a)


def calls_a_second(work: Callable[[], object], seconds: float = 0.02) -> float:
    """How often one thread of the CPU could do ``work`` in a second: by the fastest of all calls within ``seconds``, of
    three at least.

    The fastest of one thread, because other work on the machine can only slow it down, and does so the more, the more
    threads wait for each other.
    """
    best, end, done = math.inf, time.perf_counter() + seconds, 0
    with on_threads(1):
        while done < 3 or time.perf_counter() < end:
            began = time.perf_counter()
            work()
            best, done = min(best, time.perf_counter() - began), done + 1
    return 1 / best


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    """PyTorch has so many threads within the block, and as many as before behind it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Names.


def processor() -> str:
    """The model's name, as the system gives it."""
    # platform.processor() is empty or just the architecture on most Linux systems.
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def kind() -> str:
    """What PyTorch uses of the processor: ``AVX2``, ``AVX-512``, ``NEON``, and ``AVX-512, bf16`` where bf16 pays."""
    import torch

    vectors = torch.backends.cpu.get_cpu_capability()
    if vectors == "DEFAULT":
        vectors = "NEON" if platform.machine().lower() in ("aarch64", "arm64") else "no AVX"
    vectors = vectors.replace("AVX512", "AVX-512")
    return f"{vectors}, bf16" if fast_dtype(torch.device("cpu")).choice is torch.bfloat16 else vectors


# Threads.


def cores(root: Path = Path("/")) -> Answer[int]:
    """Cores that this process may use: those of its affinity, or fewer where a control group grants less time.

    Args:
        root: where ``proc`` and ``sys`` lie.
    """
    allowed, granted = _allowed(), quota(root)
    if granted < allowed:
        return Answer(max(1, math.floor(granted + 0.5)), f"the control group grants the time of {granted:g} cores")
    return Answer(allowed, f"the process may use {allowed} cores" if allowed > 1 else "the process may use one core")


def _allowed() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota(root: Path = Path("/")) -> float:
    """The cores' worth of time that control groups grant (cgroup v1 and v2), the least on the way up to the root."""
    groups = root / "sys" / "fs" / "cgroup"
    least = math.inf
    for line in _lines(root / "proc" / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = [groups / controllers, groups / "cpu", groups / "cpu,cpuacct"] if controllers else [groups]
        mount = next((m for m in mounts if m.is_dir()), groups)
        inner = mount / path.lstrip("/")
        # In a container the path may be the host's, and what is mounted the container's own group: both are looked at.
        for group in {mount, inner, *(p for p in inner.parents if mount in p.parents)}:
            least = min(least, _granted(group))
    return least


def _granted(group: Path) -> float:
    """Cores' worth of time of one control group."""
    for line in _lines(group / "cpu.max"):
        time_us, period_us = line.split()
        return math.inf if time_us == "max" else int(time_us) / int(period_us)
    given, period = _lines(group / "cpu.cfs_quota_us"), _lines(group / "cpu.cfs_period_us")
    return int(given[0]) / int(period[0]) if given and period and int(given[0]) > 0 else math.inf


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def share_cores() -> None:
    """Tells OpenMP, which PyTorch brings along, how many threads to start and not to spin for long where they wait.

    Threads of a product wait for each other. By default they do so spinning, and where other work holds a core, that
    takes most of what the cores give. What the user has set in the environment stays.
    """
    if (granted := cores().choice) < _allowed():  # OpenMP knows the affinity, but no control groups
        os.environ.setdefault("OMP_NUM_THREADS", str(granted))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def free_threads(most: int, seconds: float = 0.1) -> Answer[int]:
    """How many threads, up to ``most``, multiply fastest at the moment, with what else runs on the machine.

    Halves ``most`` as long as that gains, each time with products for ``seconds``. Leaves PyTorch at that number.
    """
    import torch

    rates: dict[int, float] = {}
    threads = most
    while True:
        torch.set_num_threads(threads)
        rates[threads] = _steady_rate(seconds)
        if threads == 1 or rates[threads] < max(rates.values()):
            break
        threads //= 2
    best = max(rates, key=lambda count: rates[count])
    torch.set_num_threads(best)
    tried = ", ".join(f"{rate / 1e9:.3g} GFLOP/s with {count}" for count, rate in rates.items())
    return Answer(best, f"products run at {tried} at the moment")


def _steady_rate(seconds: float) -> float:
    """FLOP/s over a stretch of products, with whatever comes between."""
    import torch

    rows, hidden = 1024, 256
    a, b = torch.ones(rows, hidden), torch.ones(hidden, hidden)
    a @ b  # the first call prepares threads
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        a @ b
        done += 1
    return 2 * rows * hidden**2 * done / (time.perf_counter() - began)
