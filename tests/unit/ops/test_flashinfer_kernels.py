"""Which of FlashInfer's kernels are built ahead, and how: with a stand-in for FlashInfer."""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from penstock.core.bench import load
from penstock.core.errors import PenstockError
from penstock.core.progress import Bar
from penstock.ops.paged import flashinfer_kernels
from penstock.ops.paged.codecs.fp8 import Fp8
from penstock.ops.paged.contract import CacheShape
from penstock.ops.paged.flashinfer import scales_of_outputs
from penstock.ops.paged.flashinfer_kernels import build_kernels

CUDA, BF16 = torch.device("cuda", 0), torch.bfloat16


def shape_of(*, heads: int = 8, windows: frozenset[int | None] = frozenset({None})) -> CacheShape:
    return CacheShape(2, heads, 4, 128, 100, 16, BF16, CUDA, windows)


class Library:
    """A library of FlashInfer's: of two object files, which are made one after the other, once ``others`` are under
    way too."""

    def __init__(self, folder: Path, options: dict[str, Any], others: threading.Barrier | None) -> None:
        self.options, self._others = options, others
        name = "-".join(str(value) for _, value in sorted(options.items())).replace("torch.", "")
        self._objects = [folder / f"{name}.{number}.o" for number in range(2)]
        self._library = folder / f"{name}.so"
        self.complaint = ""

    @property
    def is_compiled(self) -> bool:
        return self._library.exists()

    def get_object_paths(self) -> list[Path]:
        return self._objects

    def build(self, verbose: bool) -> None:
        if self._others is not None:
            self._others.wait(timeout=30)
        if self.complaint:
            raise RuntimeError(f"Ninja build failed. Ninja output:\nFAILED: {self.complaint}\nninja: stopped.")
        for path in [*self._objects, self._library]:
            path.touch()


@dataclasses.dataclass
class Stand:
    """What FlashInfer would have made libraries of."""

    folder: Path
    libraries: list[Library] = dataclasses.field(default_factory=list)
    together: int = 0

    def __post_init__(self) -> None:
        self._barrier: threading.Barrier | None = None

    def expect(self, together: int) -> None:
        """So many libraries are built at the same time."""
        self._barrier = threading.Barrier(together)

    def made(self, **options: Any) -> Library:
        self.libraries.append(Library(self.folder, options, self._barrier))
        return self.libraries[-1]


@pytest.fixture
def stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stand:
    found = Stand(tmp_path)
    whole, jit, utils = ModuleType("flashinfer"), ModuleType("flashinfer.jit"), ModuleType("flashinfer.utils")
    jit.gen_batch_prefill_module = lambda backend, **options: found.made(backend=backend, **options)
    jit.gen_batch_decode_module = lambda **options: found.made(backend="decode", **options)
    utils.determine_attention_backend = lambda *_: "fa3"
    for module in (whole, jit, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(flashinfer_kernels, "LOOK", 0.01)
    return found


class Reported:
    """A reporter that remembers: each bar's label, total and unit, and how far it came."""

    def __init__(self) -> None:
        self.bars: list[list[Any]] = []

    @contextmanager
    def __call__(self, label: str, total: float | None, unit: str) -> Iterator[Bar]:
        self.bars.append([label, total, unit, 0.0])
        yield self

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.bars[-1][3] += amount


def test_all_are_built_at_once_and_a_bar_counts_their_kernels(stand):
    stand.expect(2)
    reported = Reported()
    build_kernels(shape_of(), reported)
    assert {each.options["backend"] for each in stand.libraries} == {"fa2", "fa3"}
    assert all(each.is_compiled for each in stand.libraries)
    ((label, total, unit, done),) = reported.bars
    assert "FlashInfer" in label and "2" in label
    assert (total, unit, done) == (4, "kernel", 4)


def test_the_benchmark_of_opening_has_a_name_for_the_building(stand):
    opening = load("opening")
    watch = opening.Stopwatch()
    build_kernels(shape_of(), watch)
    assert watch.seconds["build kernels"] > 0
    assert "build kernels" in opening.PARTS and sum(watch.seconds.values()) == watch.seconds["build kernels"]


def test_what_is_there_is_not_built_again_and_no_bar_is_shown(stand):
    build_kernels(shape_of())
    stand.expect(99)  # whoever builds now waits in vain
    reported = Reported()
    build_kernels(shape_of(), reported)
    assert not reported.bars


def test_only_what_is_missing_is_built(stand):
    build_kernels(shape_of())
    reported = Reported()
    build_kernels(shape_of(windows=frozenset({None, 40})), reported)
    assert [bar[1:] for bar in reported.bars] == [[4, "kernel", 4]]
    assert {each.options["use_sliding_window"] for each in stand.libraries} == {False, True}


def test_heads_with_keys_of_their_own_have_a_kernel_of_their_own_for_decodes(stand):
    build_kernels(shape_of(heads=4))
    assert {each.options["backend"] for each in stand.libraries} == {"fa2", "fa3", "decode"}


def test_blocks_in_fp8_are_read_by_kernels_for_that(stand):
    build_kernels(dataclasses.replace(shape_of(), codec=Fp8()))
    assert {(each.options["dtype_q"], each.options["dtype_kv"]) for each in stand.libraries} == {
        (BF16, torch.float8_e4m3fn)
    }


@pytest.mark.parametrize("heads", [4, 8])
def test_an_output_has_the_scale_of_the_values_that_its_head_shares(heads):
    learned = torch.rand(2, 2, 4)
    found = scales_of_outputs(shape_of(heads=heads), learned)
    assert found.shape == (2, heads, 1)
    for head in range(heads):
        assert torch.equal(found[:, head, 0], learned[:, 1, head * 4 // heads])


def test_a_build_that_fails_says_why_and_what_to_do(stand, monkeypatch):
    made = stand.made

    def broken(**options: Any) -> Library:
        library = made(**options)
        library.complaint = "nvcc fatal error: no such architecture" if options["backend"] == "fa3" else ""
        return library

    monkeypatch.setattr(stand, "made", broken)
    with pytest.raises(PenstockError, match="no such architecture") as raised:
        build_kernels(shape_of())
    assert "nvcc" in raised.value.hint


def test_a_version_with_other_names_builds_at_the_first_use(stand, monkeypatch, caplog):
    monkeypatch.delattr(sys.modules["flashinfer.jit"], "gen_batch_decode_module")
    build_kernels(shape_of())
    assert not stand.libraries and "at their first use" in caplog.text
