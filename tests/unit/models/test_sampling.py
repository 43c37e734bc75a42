"""The fast distribution beside the reference's, which follows the definitions one token after another."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from penstock.core.config import build
from penstock.core.errors import ConfigError
from penstock.models.sampling import Sampling, probabilities
from penstock.testing.reference import distribution

ROUND = st.integers(-8, 8).map(lambda n: n / 4)
SCORES = st.lists(
    st.one_of(ROUND, st.floats(-40, 40), st.floats(-1e30, 1e30), st.just(-math.inf)), min_size=1, max_size=24
).filter(lambda scores: max(scores) > -math.inf)
TEMPERATURES = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 1e-300, 1e-45, 1e-9, 1e9]), st.floats(0.05, 5))
SHARES = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.floats(0, 1))


def sampling(temperature: float, top_k: int | None, top_p: float, min_p: float) -> Sampling:
    return Sampling(temperature=temperature, top_k=top_k, top_p=top_p or 1e-9, min_p=min_p)


def is_decided(logits: torch.Tensor, options: Sampling) -> bool:
    """Whether no cut runs so close to a token that rounding alone says on which side it falls."""
    chances = distribution(logits, options.model_copy(update={"top_p": 1.0, "min_p": 0.0}))
    ordered = torch.tensor(sorted(chances, reverse=True), dtype=torch.float64)
    near_p = (ordered.cumsum(0) - options.top_p).abs().min() < 1e-12 and options.top_p < 1
    near_m = (ordered - options.min_p * ordered[0]).abs().min() < 1e-15 and 0 < options.min_p < 1
    return not near_p and not near_m


@given(SCORES, TEMPERATURES, st.one_of(st.none(), st.integers(1, 30)), SHARES, SHARES)
@example([1.0], 1.0, 5, 0.5, 0.5)
@example([0.0, 0.0, 0.0, 0.0], 1.0, 2, 1.0, 0.0)
@example([2.0, 1.0, 1.0, 0.0], 0.7, 2, 1.0, 1.0)
@example([-math.inf, 3.0, -math.inf], 1.0, 2, 0.5, 0.1)
@example([3.0, -math.inf, 1.0], 0.0, None, 1.0, 0.0)
@example([1e30, -1e30, 0.0], 1e-300, None, 0.9, 0.1)
@example([-4e-82, 0.0], 0.25, None, 1e-9, 0.0)
def test_equals_the_reference(scores, temperature, top_k, top_p, min_p):
    options = sampling(temperature, top_k, top_p, min_p)
    logits = torch.tensor(scores, dtype=torch.float64)
    assume(is_decided(logits, options))
    got = probabilities(logits, options)
    wanted = torch.tensor(distribution(logits, options), dtype=torch.float64)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-300)
    assert torch.equal(got > 0, wanted > 0)


@given(st.lists(SCORES.map(lambda s: (s * 24)[:24]), min_size=1, max_size=4), TEMPERATURES, SHARES, SHARES)
def test_rows_of_a_batch_are_independent(rows, temperature, top_p, min_p):
    options = sampling(temperature, 5, top_p, min_p)
    logits = torch.tensor(rows, dtype=torch.float64)
    batch = probabilities(logits.unsqueeze(0), options)[0]
    assert all(torch.equal(batch[i], probabilities(logits[i], options)) for i in range(len(rows)))


@given(
    SCORES,
    TEMPERATURES,
    st.one_of(st.none(), st.integers(1, 30)),
    SHARES,
    SHARES,
    st.sampled_from(["float32", "bfloat16"]),
)
def test_any_dtype_gives_a_distribution(scores, temperature, top_k, top_p, min_p, dtype):
    logits = torch.tensor(scores, dtype=getattr(torch, dtype))
    got = probabilities(logits, sampling(temperature, top_k, top_p, min_p))
    assert got.dtype == logits.dtype
    assert (got >= 0).all()
    assert got.double().sum() == pytest.approx(1, abs=0.02 if dtype == "bfloat16" else 1e-5)
    assert got[logits.argmax()] > 0


LOGITS = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [1 / 2, 1 / 4, 1 / 8, 1 / 8]),
        ({"temperature": 0.5}, [16 / 22, 4 / 22, 1 / 22, 1 / 22]),
        ({"temperature": 0}, [1, 0, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 3}, [1 / 2, 1 / 4, 1 / 8, 1 / 8]),  # the fourth ties with the third
        ({"top_k": 9}, [1 / 2, 1 / 4, 1 / 8, 1 / 8]),
        ({"top_p": 0.4}, [1, 0, 0, 0]),
        ({"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.8}, [4 / 7, 2 / 7, 1 / 7, 0]),  # of tokens that tie, the first
        ({"min_p": 0.4}, [2 / 3, 1 / 3, 0, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0]),
        ({"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),  # of what top-k left, the first has two thirds
        ({"top_p": 0.8, "min_p": 0.3}, [2 / 3, 1 / 3, 0, 0]),
    ],
)
def test_by_hand(options, wanted):
    for chances in (probabilities(LOGITS, Sampling(**options)).tolist(), distribution(LOGITS, Sampling(**options))):
        assert chances == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.5, 2), (0.75, 3), (0.76, 4)])
def test_a_share_that_is_reached_exactly_needs_no_further_token(top_p, kept):
    """Powers of two, which no rounding blurs."""
    wanted = [1 / kept] * kept + [0.0] * (4 - kept)
    logits = torch.zeros(4, dtype=torch.float64)
    assert probabilities(logits, Sampling(top_p=top_p)).tolist() == wanted
    assert distribution(logits, Sampling(top_p=top_p)) == wanted


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_k": 1.5},
        {"top_p": 0},
        {"top_p": 1.01},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"max_tokens": 0},
        {"seed": "x"},
        {"temprature": 1},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        build(Sampling, options)
