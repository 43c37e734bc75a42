"""The chunked cross-entropy against PyTorch's own over all logits at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from penstock.core.randomness import torch_generator
from penstock.ops.cross_entropy import IGNORE, linear_cross_entropy, linear_log_probabilities


def problem(rows: int, vocabulary: int = 7, width: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Hidden states, a head, and targets, about a third of which are ignored."""
    draw = torch_generator(0, "cross entropy", rows, vocabulary, width)
    hidden = torch.randn(rows, width, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), generator=draw)
    targets[torch.rand(rows, generator=draw) < 0.3] = IGNORE
    return hidden, weight, targets


def reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """Summed loss and gradients in float64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE, reduction="sum")
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]


@given(st.integers(0, 40), st.integers(1, 20), st.integers(1, 50))
def test_equals_the_whole_at_once(rows: int, vocabulary: int, chunk: int):
    """Loss and gradients, also of no rows, of a vocabulary of one, and with a last chunk that is not full."""
    hidden, weight, targets = problem(rows, vocabulary)
    loss = linear_cross_entropy(hidden, weight, targets, chunk=chunk)
    ours = [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]
    torch.testing.assert_close(ours, reference(hidden, weight, targets), rtol=0, atol=1e-11)


def test_gradients_equal_differences():
    hidden, weight, targets = problem(9)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, chunk=4).sin(), (hidden, weight))


@pytest.fixture(autouse=True, params=["predicted rows", "all rows"])
def computed(request, monkeypatch) -> None:
    """What is computed on the CPU, and in code of one shape for any targets, as it is compiled."""
    if request.param == "all rows":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def test_ignored_rows_count_nothing():
    hidden, weight, _ = problem(6)
    loss = linear_cross_entropy(hidden, weight, torch.full((6,), IGNORE))
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss == 0
    assert all(grad.abs().max() == 0 for grad in grads)


@pytest.mark.parametrize("chunk", [4, 64])
def test_log_probabilities_of_the_predicted_rows(chunk: int):
    hidden, weight, targets = problem(11)
    found = linear_log_probabilities(hidden, weight, targets, chunk=chunk)
    wanted = -F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(found, wanted)
    factors = torch.arange(11.0, dtype=found.dtype)
    grads = [torch.autograd.grad((each * factors).sum(), (hidden, weight)) for each in (found, wanted)]
    torch.testing.assert_close(*grads)
    none = linear_log_probabilities(hidden, weight, torch.full((11,), IGNORE))
    assert none.shape == (11,) and not none.any()


def test_large_logits_stay_finite():
    hidden, weight, targets = problem(8, dtype=torch.float32)
    loss = linear_cross_entropy(1e4 * hidden, weight, targets)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_sums_in_fp32(autocast: bool):
    """Products are rounded to 8 bits, sums are not; under autocast, gradients come back in fp32."""
    hidden, weight, targets = problem(300, 50, 16, torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = linear_cross_entropy(hidden, weight, targets, chunk=64)
    grads = torch.autograd.grad(loss, (hidden, weight))
    expected, *expected_grads = reference(hidden, weight, targets)
    assert loss.dtype == torch.float32
    assert [grad.dtype for grad in grads] == [hidden.dtype, weight.dtype]
    torch.testing.assert_close(loss.double(), expected, rtol=2e-3, atol=0)
    for grad, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), want, rtol=0, atol=0.02 * want.abs().max().item())


class Largest(TorchDispatchMode):
    """Notes the most rows of logits that any operator has made."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dim() == 2 and out.shape[1] == self.vocabulary:
            self.rows = max(self.rows, out.shape[0])
        return out


def test_no_more_than_a_chunk_of_logits_exists():
    hidden, weight, targets = problem(64, vocabulary=31)
    with Largest(31) as seen:
        linear_cross_entropy(hidden, weight, targets, chunk=8).backward()
    assert seen.rows == 8


def test_without_gradients_the_loss_is_the_same():
    generator = torch.Generator().manual_seed(7)
    hidden, weight = torch.randn(11, 8, generator=generator), torch.randn(5, 8, generator=generator)
    targets = torch.tensor([0, 1, 2, 3, 4, IGNORE, 0, 1, 2, IGNORE, 4])
    with_gradients = linear_cross_entropy(hidden.requires_grad_(), weight, targets, chunk=4)
    with torch.no_grad():
        without = linear_cross_entropy(hidden, weight, targets, chunk=4)
    assert not without.requires_grad
    torch.testing.assert_close(without, with_gradients.detach())
