"""Kernels compiled on first use: what is kept, what goes wrong, and whose threads they run on."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from penstock.core.errors import PenstockError
from penstock.ops import native
from penstock.ops.paged.cpu import Native
from programs import Program

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")

SUM = """
extern "C" long sum_to(long n) {
    long total = 0;
#pragma omp parallel for reduction(+ : total)
    for (long i = 1; i <= n; ++i) total += i;
    return total;
}
"""


def count_runtimes(source: Path) -> None:
    """What a process runs: prints how many OpenMP runtimes it has once the kernel and PyTorch have computed."""
    kernel = native.load(source)
    torch.ones(10**6).sum()
    assert kernel.sum_to(1000) == 500500
    maps = Path("/proc/self/maps").read_text().splitlines()
    print(len({line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line}))


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A kernel, and a cache of its own for what is made of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    native._made.cache_clear()
    path = tmp_path / "sum.cpp"
    path.write_text(SUM)
    yield path
    native._made.cache_clear()


def kept(source: Path) -> list[Path]:
    return sorted((source.parent / "cache" / "penstock" / "kernels").iterdir())


def test_compiles_anew_when_a_header_changes(source):
    for first in (1, 6):
        (source.parent / "first.h").write_text(f"constexpr long FIRST = {first};\n")
        source.write_text('#include "first.h"\n' + SUM.replace("i = 1", "i = FIRST"))
        assert native.load(source).sum_to(ctypes.c_long(10)) == sum(range(first, 11))
        native._made.cache_clear()
    assert len(kept(source)) == 2


def test_those_that_were_not_made_yet_are_built_at_once(source):
    other, broken = (source.with_name(f"{name}.cpp") for name in ("other", "broken"))
    other.write_text(SUM.replace("i = 1", "i = 6"))
    broken.write_text("no C++")
    told = []

    @contextlib.contextmanager
    def report(label, total, unit):
        yield SimpleNamespace(advance=lambda amount=1: told.append((label, total, unit)))

    native.build([source, other, broken], report)
    assert told == [("building 3 native kernels, once on this machine", 3, "kernel")] * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_compile", lambda *_: pytest.fail("it was compiled again"))
        native.build([source, other], report)
        assert native.load(other).sum_to(ctypes.c_long(10)) == 40
    assert len(told) == 3 and not native.serves(broken)


def test_compiles_once_and_anew_when_the_source_changes(source, monkeypatch):
    assert native.load(source).sum_to(ctypes.c_long(10)) == 55
    (library,) = kept(source)
    native._made.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(native, "_compile", lambda *_: pytest.fail("it was compiled again"))
        native.load(source)
    native._made.cache_clear()
    source.write_text(SUM.replace("total = 0", "total = 1"))
    assert native.load(source).sum_to(ctypes.c_long(10)) == 56
    assert len(kept(source)) == 2
    assert library in kept(source)


def test_another_processor_has_a_library_of_its_own(source, monkeypatch):
    native.load(source)
    native._made.cache_clear()
    monkeypatch.setattr(native, "_processor", lambda: "another")
    native.load(source)
    assert len(kept(source)) == 2


def test_two_processes_at_once_make_one_library_and_each_has_one_openmp_runtime(source):
    place = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    processes = [Program(count_runtimes, source, environment=place) for _ in range(2)]
    assert [process.completed().stdout.strip() for process in processes] == ["1", "1"]
    (library,) = kept(source)
    assert library.suffix == ".so"


def test_no_compiler_is_a_reason_not_to_serve(source, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(PenstockError, match="Install GCC"):
        native.load(source)
    assert "'no-such-compiler' is not there" in Native().serves(torch.device("cpu"), torch.float32, 16)


def test_where_nothing_can_be_kept_kernels_are_compiled_once_a_process(source, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert native.load(source).sum_to(ctypes.c_long(10)) == 55
    (told,) = caplog.messages
    assert "is compiled at each start" in told and f"cannot write {tmp_path / 'file'}" in told
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("it was compiled again"))
    assert native.serves(source) and native.load(source).sum_to(ctypes.c_long(4)) == 10


def test_what_cannot_be_made_is_told_once_and_tried_once(source, monkeypatch, caplog):
    broken = [source.with_name(f"{name}.cpp") for name in ("one", "two")]
    for each in broken:
        each.write_text("not C++")
    native.build([source, *broken])
    (told,) = caplog.messages
    assert told.startswith("2 of 3 native kernels are not there; one: ") and "cannot compile" in told
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("it was compiled again"))
    for each in broken:
        with pytest.raises(PenstockError, match="cannot compile"):
            native.load(each)


def test_a_user_without_a_home_is_told_what_to_set(source, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
    with pytest.raises(PenstockError, match="XDG_CACHE_HOME"):
        native.load(source)


def test_a_source_that_does_not_compile_is_named_and_leaves_nothing(source):
    source.write_text("not C++")
    with pytest.raises(PenstockError, match=f"cannot compile {source}"):
        native.load(source)
    assert not (source.parent / "cache").exists()


def test_a_damaged_library_is_named(source, monkeypatch):
    monkeypatch.setattr(native, "_compile", lambda *_: b"damaged")
    with pytest.raises(PenstockError, match=r"cannot load .*sum-\w+\.so: .*\nRemove that file"):
        native.load(source)
