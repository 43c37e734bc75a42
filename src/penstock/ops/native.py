"""C++ kernels, compiled on the machine that runs them, once for each kind of processor.

A kernel is one C++17 source file with ``extern "C"`` functions over plain pointers, and may include headers of its
folder. It is compiled by GCC with ``-march=native`` and kept in the user's cache folder, under a name made of all that
it depends on. OpenMP's runtime is left out of the link: its symbols resolve to the one that torch has loaded for
everybody in the process, so that kernels share torch's threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol

from penstock.core.errors import PenstockError
from penstock.core.files import cache_folder, explain_os_errors, write_atomic
from penstock.core.processor import cores
from penstock.core.progress import Reporter, silent

log = logging.getLogger(__name__)

FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-fopenmp"),
    # For some processors GCC would split a multiplication from its addition in loops with one sum, and not in those
    # with several: a row's bits would depend on how many are computed together.
    "--param=avoid-fma-max-bits=0",
)


class Recorder(Protocol):
    """Takes note of native calls."""

    def note(self, function: Function, arguments: tuple[Any, ...]) -> None:
        """A call of ``function``."""
        ...

    def keep(self, *objects: object) -> None:
        """What calls are given the addresses of."""
        ...


class _Own(threading.local):
    """What a thread has for itself."""

    recorder: Recorder | None = None


_own = _Own()


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """In this context ``recorder`` is told of what this thread calls."""
    _own.recorder = recorder
    try:
        yield
    finally:
        _own.recorder = None


def keep(*objects: object) -> bool:
    """Whether calls are recorded; then ``objects``, whose addresses they are given, are kept with them."""
    if _own.recorder is None:
        return False
    _own.recorder.keep(*objects)
    return True


class Function:
    """A function of a library that returns nothing.

    Args:
        library: has it.
        name: of the function.
        types: of what it takes: addresses, whole numbers, and at most one real number.

    Attributes:
        address: where it lies.
        real: which of its arguments is the real number; None for none.
    """

    def __init__(self, library: ctypes.CDLL, name: str, types: Sequence[Any]) -> None:
        self._function = getattr(library, name)
        self._function.argtypes, self._function.restype = types, None
        self.address = ctypes.cast(self._function, ctypes.c_void_p).value
        self.real = types.index(ctypes.c_double) if ctypes.c_double in types else None

    def __call__(self, *arguments: Any) -> None:
        self._function(*arguments)
        if _own.recorder is not None:
            _own.recorder.note(self, arguments)


def load(source: Path) -> ctypes.CDLL:
    """The library made from ``source``; it is compiled where that has not happened on such a machine yet. Where it
    cannot be kept, it is compiled once a process.

    Raises:
        PenstockError: there is no compiler, it fails, or what it makes cannot be loaded.
    """
    made = _made(source)
    if isinstance(made, PenstockError):
        raise made
    return made


@functools.cache
def _made(source: Path) -> ctypes.CDLL | PenstockError:
    """The library made from ``source``, or why there is none: whoever asks again need not wait again."""
    try:
        compiler = _compiler()
        with explain_os_errors(f"cannot read what the kernel {source.stem} depends on"):
            library = _library(compiler, source)
            there = library.is_file()
        return _loaded(library) if there else _kept(library, _compile(compiler, source))
    except PenstockError as error:
        return error


def _kept(library: Path, compiled: bytes) -> ctypes.CDLL:
    """The library that was ``compiled``, kept where it is looked for the next time, if that can be."""
    try:
        write_atomic(library, compiled)
    except PenstockError as error:
        log.warning("the kernel %s is compiled at each start, as it cannot be kept: %s", library.name, error)
        descriptor = os.memfd_create(library.name)
        with os.fdopen(descriptor, "wb") as memory:
            memory.write(compiled)
            memory.flush()
            return _loaded(Path(f"/proc/self/fd/{descriptor}"))
    return _loaded(library)


def _loaded(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise PenstockError(
            f"cannot load {library}: {error}", hint="Remove that file; it is compiled anew at the next use."
        ) from error


def build(sources: Sequence[Path], report: Reporter = silent) -> None:
    """Makes libraries from those of ``sources`` from which none was made on such a machine yet, as many at a time as
    there are cores, and reports it. Of what cannot be made the log says why: PyTorch computes it, more slowly."""
    try:
        compiler = _compiler()
        missing = [source for source in sources if not _library(compiler, source).is_file()]
    except (PenstockError, OSError) as error:
        log.warning("there are no native kernels: %s", error)
        return
    if not missing:
        return
    label = f"building {len(missing)} native kernels, once on this machine"
    with report(label, len(missing), "kernel") as bar, ThreadPoolExecutor(cores().choice) as pool:
        for _ in as_completed([pool.submit(_made, source) for source in missing]):
            bar.advance()
    failed = {source.stem: made for source in missing if isinstance(made := _made(source), PenstockError)}
    if failed:
        name, reason = next(iter(failed.items()))
        log.warning("%d of %d native kernels are not there; %s: %s", len(failed), len(missing), name, reason)


def serves(source: Path) -> bool:
    """Whether there is a library made from ``source``, or can be; it is made now, where it has not been."""
    return not isinstance(_made(source), PenstockError)


def _compiler() -> str:
    if sys.platform != "linux":
        raise PenstockError("native kernels are made for Linux")
    wanted = os.environ.get("CXX") or "g++"
    found = shutil.which(wanted)
    if found is None:
        raise PenstockError(
            f"native kernels need a C++ compiler, and {wanted!r} is not there",
            hint="Install GCC (package g++), or name it in the variable CXX.",
        )
    return found


def _library(compiler: str, source: Path) -> Path:
    """Where the library lies that ``compiler`` makes from ``source`` here, once it has."""
    texts = [each.read_bytes() for each in (source, *sorted(source.parent.glob("*.h")))]
    identity = "\n".join([compiler, *FLAGS, _processor()]).encode() + b"".join(texts)
    return cache_folder("kernels") / f"{source.stem}-{hashlib.blake2b(identity, digest_size=12).hexdigest()}.so"


def _compile(compiler: str, source: Path) -> bytes:
    with tempfile.TemporaryDirectory(prefix="penstock-") as scratch:
        compiled, linked = Path(scratch, "kernel.o"), Path(scratch, "kernel.so")
        for arguments in (
            [*FLAGS, "-c", str(source), "-o", str(compiled)],
            ["-shared", str(compiled), "-o", str(linked)],
        ):
            done = subprocess.run([compiler, *arguments], capture_output=True, text=True, errors="replace")
            if done.returncode != 0:
                complaint = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
                raise PenstockError(
                    f"{compiler} cannot compile {source}: {complaint}",
                    hint="It must be GCC, of version 12 or near it; name another in the variable CXX.",
                )
        return linked.read_bytes()


def _processor() -> str:
    """What ``-march=native`` depends on: a home folder may be shared by machines of different kinds."""
    first, _, _ = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")
    kept = ("vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features")
    lines = [line for line in first.splitlines() if line.partition(":")[0].strip() in kept]
    return "\n".join([platform.machine(), *lines])
