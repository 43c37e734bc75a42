"""Drawing by chunks, beside the cumulated distribution written down in fp64: on a CPU, and by the kernels for CUDA,
which Triton's interpreter also runs (``TRITON_INTERPRET=1``)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from penstock.ops.draw import BELOW, CHUNK, MANY, TINY, Floor, draw_softmax

Draw = Callable[..., Tensor]


def by_kernels(logits: Tensor, temperature: Tensor, uniform: Tensor, floor: Floor | None = None) -> Tensor:
    from interpreted import DEVICE
    from penstock.ops.draw_kernel import drawn

    floor = floor or Floor(torch.full((len(logits),), -torch.inf), torch.full((len(logits),), MANY))
    moved = [each.to(DEVICE) for each in (logits, temperature, uniform, *floor)]
    return drawn(*moved, chunk=CHUNK, tiny=TINY, below=BELOW).cpu()


@pytest.fixture(params=[draw_softmax, by_kernels])
def draw(request: pytest.FixtureRequest) -> Draw:
    if request.param is by_kernels and (obstacle := pytest.importorskip("interpreted").OBSTACLE):
        pytest.skip(obstacle)
    return request.param


@pytest.mark.parametrize("size", [1, 2, 50, CHUNK, CHUNK + 1, 3 * CHUNK - 1, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_token_is_where_the_cumulated_probability_passes_the_number(size, dtype, draw):
    generator = torch.Generator().manual_seed(size)
    logits = (torch.randn(64, size, generator=generator) * 3).to(dtype)
    temperature = torch.rand(64, generator=generator, dtype=torch.float64) * 2 + 0.05
    uniform = torch.rand(64, generator=generator, dtype=torch.float64)
    uniform[:4] = torch.tensor([0.0, 1 - 2.0**-53, 0.5, 1e-300], dtype=torch.float64)
    tokens = draw(logits, temperature, uniform)
    chances = (logits.double() / temperature.unsqueeze(-1)).softmax(-1)
    reached = chances.cumsum(-1)
    at = reached.gather(1, tokens.unsqueeze(-1)).squeeze(-1)
    before = at - chances.gather(1, tokens.unsqueeze(-1)).squeeze(-1)
    assert ((before <= uniform + 1e-5) & (uniform <= at + 1e-5)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_above_a_floor_the_token_is_of_what_is_left(dtype, draw):
    """Scores on a grid, where several tie with the floor: of high floors most chunks have nothing left, and the lowest
    leave all."""
    generator = torch.Generator().manual_seed(1)
    logits = ((torch.randn(64, 5 * CHUNK + 9, generator=generator) * 3).round() / 2).to(dtype)
    logits[:, CHUNK : 2 * CHUNK] = -torch.inf
    places = torch.randint(0, 2000, (64, 1), generator=generator) ** 2 // 2000
    least = logits.float().sort(-1, descending=True).values.gather(1, places).squeeze(-1)
    least[:8], ties = -torch.inf, torch.randint(1, 9, (64,), generator=generator)
    ties[:16] = MANY
    tied = logits.float() == least.unsqueeze(-1)
    left = (logits.float() > least.unsqueeze(-1)) | (tied & (tied.cumsum(-1) <= ties.unsqueeze(-1)))
    temperature = torch.rand(64, generator=generator, dtype=torch.float64) * 2 + 0.05
    uniform = torch.rand(64, generator=generator, dtype=torch.float64)
    tokens = draw(logits, temperature, uniform, Floor(least, ties)).unsqueeze(-1)
    assert left.gather(1, tokens).all() and (~left).any(-1)[8:].all()
    chances = (logits.double() / temperature.unsqueeze(-1)).masked_fill(~left, -torch.inf).softmax(-1)
    at = chances.cumsum(-1).gather(1, tokens).squeeze(-1)
    before = at - chances.gather(1, tokens).squeeze(-1)
    assert ((before <= uniform + 1e-5) & (uniform <= at + 1e-5)).all()


def test_what_has_no_weight_is_never_drawn(draw):
    """Forbidden tokens at both ends of chunks, and numbers at both ends of the range."""
    logits = torch.full((3, 2 * CHUNK + 7), -torch.inf)
    logits[:, CHUNK - 1] = 1e4
    logits[:, CHUNK + 3] = 1e4
    uniform = torch.tensor([0.0, 0.75, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(logits, torch.full_like(uniform, 1e-3), uniform).tolist() == [CHUNK - 1, CHUNK + 3, CHUNK + 3]


def test_the_law_is_the_softmax(draw):
    """Evenly spread numbers hit each token as often as its probability says."""
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).repeat(20_000, 1)
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    counts = draw(logits, torch.full_like(uniform, 0.7), uniform).bincount(minlength=4)
    torch.testing.assert_close(counts / 20_000, (logits[0] / 0.7).softmax(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_temperature_takes_the_first_of_the_most_probable(dtype, draw):
    """Scores on a coarse grid, where ties are many."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(200, 3 * CHUNK + 5, generator=generator) * 2).round().to(dtype) / 8 - 300
    nothing = torch.zeros(200, dtype=torch.float64)
    first = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    assert (first >= CHUNK).any() and (first < CHUNK).any()
    assert torch.equal(draw(logits, nothing, nothing), first)


def test_scores_that_are_not_numbers_give_a_token_all_the_same(draw):
    logits = torch.full((2, CHUNK + 9), torch.nan)
    tokens = draw(logits, torch.tensor([0.0, 1.0]).double(), torch.tensor([0.0, 0.9]).double())
    assert ((tokens >= 0) & (tokens < CHUNK + 9)).all()
