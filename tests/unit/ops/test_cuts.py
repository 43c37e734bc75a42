"""Floors of cut rows, and draws above them, beside the reference's distribution, one token after another."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from penstock.core.randomness import torch_generator
from penstock.models.sampling import Sampling
from penstock.ops.cuts import SHORTLIST, draw_cut, floor_of
from penstock.ops.draw import CHUNK
from penstock.testing.reference import distribution

ROUND = st.integers(-8, 8).map(lambda n: n / 4)
SCORES = st.lists(st.one_of(ROUND, st.floats(-40, 40, width=32), st.just(-math.inf)), min_size=24, max_size=24).filter(
    lambda scores: max(scores) > -math.inf
)
SHARES = st.one_of(st.sampled_from([0.25, 0.5, 0.75, 1.0]), st.floats(1e-9, 1))
OPTIONS = st.builds(
    Sampling,
    temperature=st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 1e-9, 1e9]), st.floats(0.05, 5)),
    top_k=st.one_of(st.none(), st.integers(1, 30)),
    top_p=SHARES,
    min_p=st.one_of(st.just(0.0), SHARES),
)


def draws(options: list[Sampling], uniform: list[float] | float = 0.0) -> torch.Tensor:
    """float64 [5, R], as :func:`draw_cut` wants them."""
    cuts = [[each.temperature, each.top_k or 0, each.top_p, each.min_p] for each in options]
    numbers = torch.as_tensor(uniform, dtype=torch.float64).expand(len(options))
    return torch.cat([torch.tensor(cuts, dtype=torch.float64).T, numbers.unsqueeze(0)])


def kept(logits: torch.Tensor, options: list[Sampling]) -> torch.Tensor:
    """Which tokens stay, bool [R, V]."""
    floor = floor_of(logits, draws(options)[:4])
    if floor is None:
        return torch.ones_like(logits, dtype=torch.bool)
    tied = logits == floor.score.unsqueeze(-1)
    return (logits > floor.score.unsqueeze(-1)) | (tied & (tied.cumsum(-1) <= floor.ties.unsqueeze(-1)))


def is_decided(logits: torch.Tensor, options: Sampling) -> bool:
    """Whether no cut runs so close to a token that rounding alone says on which side it falls."""
    chances = distribution(logits.double(), options.model_copy(update={"top_p": 1.0, "min_p": 0.0}))
    ordered = torch.tensor(sorted(chances, reverse=True), dtype=torch.float64)
    # Weights are float32, as scores are, whose steps a low temperature makes large.
    step = 1e-6 * (1 + float(logits[logits > -math.inf].abs().max()) / max(options.temperature, 1e-9))
    near_p = options.top_p < 1 and (ordered.cumsum(0) - options.top_p).abs().min() < step
    near_m = 0 < options.min_p < 1 and ((ordered / ordered[0]).log() - math.log(options.min_p)).abs().min() < step
    return not near_p and not near_m


@given(st.lists(st.tuples(SCORES, OPTIONS), min_size=1, max_size=5))
@example([([0.0] * 24, Sampling(top_p=0.25)), ([0.0] * 24, Sampling(top_k=2, top_p=0.5))])
@example([([2.0, 1.0, 1.0, 0.0] * 6, Sampling(temperature=0.7, top_k=7, top_p=0.9, min_p=1.0))])
def test_what_stays_is_what_the_reference_keeps(rows):
    """Rows with options of their own. Tokens without any probability may stay or not."""
    logits = torch.tensor([scores for scores, _ in rows], dtype=torch.float32)
    found = kept(logits, [options for _, options in rows])
    for own, scores, (_, options) in zip(found, logits, rows, strict=True):
        assume(is_decided(scores, options))
        if options.temperature > 0:
            chances = torch.tensor(distribution(scores.double(), options))
            weighty = ((scores.double() - scores.max()) / options.temperature).exp() > 1e-37
            assert torch.equal(own & weighty, (chances > 0) & weighty)


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("steepness", [0.0, 0.3, 1.5, 5.0])
@pytest.mark.parametrize("step", [0.0, 0.5])
@pytest.mark.parametrize("top_k", [None, 40, SHORTLIST + 100])
def test_a_share_of_a_large_vocabulary(top_p, steepness, step, top_k):
    """Peaked, flat, and full of ties: whether a short list of tokens is enough, or all have to be sorted."""
    size = 2 * SHORTLIST + 17
    rank = torch.randperm(size, generator=torch_generator(0, "ranks")) + 1
    scores = -steepness * rank.double().log()
    logits = ((scores / step).round() * step if step else scores).float()
    options = Sampling(top_p=top_p, top_k=top_k)
    alone = kept(logits.unsqueeze(0), [options])[0]
    beside = kept(torch.stack([logits, torch.zeros(size)]), [options, options.model_copy(update={"top_k": None})])[0]
    assert torch.equal(alone, beside), "a flat neighbour makes a difference"
    if is_decided(logits, options):
        wanted = torch.tensor(distribution(logits.double(), options), dtype=torch.float64)
        assert torch.equal(alone, wanted > 0)


@pytest.mark.parametrize(
    "options",
    [
        Sampling(temperature=0.7, top_k=9, top_p=0.8),
        Sampling(temperature=1.3, top_p=0.7),
        Sampling(temperature=2.0, min_p=0.2),
        Sampling(temperature=1.0, top_k=3),
    ],
)
@pytest.mark.parametrize("coarse", [False, True])
def test_evenly_spread_numbers_hit_each_token_as_often_as_its_probability_says(options, coarse):
    """Over several chunks, with ties that are cut in the midst."""
    rows, size = 4000, 2 * CHUNK + 40
    scores = 2 * torch.randn(size, generator=torch_generator(3, "scores"))
    scores = scores.round() if coarse else scores
    uniform = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    tokens = draw_cut(scores.expand(rows, -1), draws([options] * rows, uniform.tolist()))
    wanted = torch.tensor(distribution(scores.double(), options), dtype=torch.float64)
    # The token of a number is where the cumulated probability passes it, so counts are off by less than one.
    assert (tokens.bincount(minlength=size) / rows - wanted).abs().max() < 1.01 / rows
    assert (tokens[1:] >= tokens[:-1]).all()


def test_a_row_has_the_same_token_whatever_the_others_ask_for():
    generator = torch_generator(1, "rows")
    logits = torch.randn(40, 3000, generator=generator) * 3
    kinds = [Sampling(), Sampling(top_p=0.9), Sampling(top_k=30), Sampling(top_k=500, top_p=0.99), Sampling(min_p=0.1)]
    options = [kinds[row % 5].model_copy(update={"temperature": 0.5 + row / 40}) for row in range(40)]
    uniform = torch.rand(40, generator=generator, dtype=torch.float64).tolist()
    together = draw_cut(logits, draws(options, uniform))
    alone = [int(draw_cut(logits[row : row + 1], draws([options[row]], uniform[row]))) for row in range(40)]
    assert together.tolist() == alone


@pytest.mark.parametrize(("top_p", "count"), [(0.25, 1), (0.5, 2), (0.75, 3), (0.76, 4)])
@pytest.mark.parametrize("top_k", [None, 1, 4, 9])
def test_a_share_that_is_reached_exactly_needs_no_further_token(top_p, count, top_k):
    """Four that tie, of a weight that no rounding blurs; those that tie with the k-th stay, so that top-k says
    nothing. The others have none."""
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf, 0.0, 0.0]])
    found = kept(logits, [Sampling(top_p=top_p, top_k=top_k)])
    assert found.nonzero()[:, 1].tolist() == [1, 2, 4, 5][:count]
