"""Products on CPUs: what they are, and which go through the kernel that reads a matrix once."""

from __future__ import annotations

import pytest
import torch

from penstock.core.randomness import torch_generator
from penstock.ops import invariant, native
from penstock.ops import linear as linear_module
from penstock.ops.linear import FEW_ON_CPUS, LARGE, linear

SIZE, HEIGHT = 300, LARGE // 300 + 1
#: Of the result relative to the largest: its own rounding, or that of sums of hundreds.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-8}

needs_kernel = pytest.mark.skipif(not native.serves(invariant.SOURCE), reason="there is no native kernel here")


def drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch_generator(0, str(shape)), dtype=torch.float64).to(dtype)


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """The rows of each product that goes through the kernel."""
    found, product = [], invariant.invariant_linear
    monkeypatch.setattr(invariant, "invariant_linear", lambda x, *more: (found.append(x.numel()), product(x, *more))[1])
    return found


@needs_kernel
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("faster", [False, True])
@pytest.mark.parametrize("dtype", FEW_ON_CPUS)
def test_rows_times_a_large_matrix_are_what_they_should_be(dtype, faster, biased, read, monkeypatch):
    monkeypatch.setattr(linear_module, "outruns_libraries", lambda: faster)
    weight, bias = drawn(HEIGHT, SIZE, dtype=dtype), drawn(HEIGHT, dtype=dtype) if biased else None
    few = FEW_ON_CPUS[dtype]
    for shape in ((1,), (few,), (few + 1,), (2, few // 2), (3, few)):
        x = drawn(*shape, SIZE, dtype=dtype)
        with torch.no_grad():
            found = linear(x, weight, bias)
        wanted = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert found.dtype == dtype
        assert (found.double() - wanted).abs().max() <= TOLERANCES[dtype] * wanted.abs().max()
    many = faster and dtype == torch.float32
    rows = [1, few, *([few + 1] if many else []), few // 2 * 2, *([3 * few] if many else [])]
    assert read == [SIZE * each for each in rows]


@needs_kernel
def test_libraries_are_outrun_where_they_take_clearly_longer(monkeypatch):
    calls = {invariant.invariant_linear: 120.0, torch.nn.functional.linear: 90.0}
    monkeypatch.setattr(linear_module, "calls_a_second", lambda work: calls[work.func])
    assert linear_module.outruns_libraries.__wrapped__()
    calls[torch.nn.functional.linear] = 110.0
    assert not linear_module.outruns_libraries.__wrapped__()


@needs_kernel
def test_all_others_are_the_librarys(read):
    weight, x = drawn(HEIGHT, SIZE, dtype=torch.float32), drawn(2, SIZE, dtype=torch.float32)
    linear(x, weight)  # a gradient may be wanted
    with torch.no_grad():
        linear(x, weight[: HEIGHT // 2])
        linear(x, weight.t().contiguous().t())
        linear(x.double(), weight.double())
        linear(x[:0], weight)
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x, weight).dtype == torch.bfloat16
        assert not read
        linear(x, torch.nn.Parameter(weight))
    assert read == [2 * SIZE]
