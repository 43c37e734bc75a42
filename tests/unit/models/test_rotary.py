"""Rotary embedding beside complex multiplication and transformers' own frequencies."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from penstock.core.randomness import torch_generator
from penstock.models.config import LongRopeScaling, RopeConfig, YarnScaling
from penstock.models.families.contract import HubConfig
from penstock.models.families.rope import rope_from_hub
from penstock.models.rotary import Rotaries, Rotary, rotations, scaled_frequencies
from penstock.ops.rotary import rotate
from penstock.testing.serve_model import SHAPE

CONTEXT = 4096
THETAS = st.floats(50.0, 1e7)
DIMS = st.integers(1, 64).map(lambda half: 2 * half)
FACTORS = st.floats(1.0, 64.0)
ORIGINAL = {"original_max_position_embeddings": st.integers(64, 8192)}
LINEAR = st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": FACTORS})
LLAMA3 = st.fixed_dictionaries(
    {
        "rope_type": st.just("llama3"),
        "factor": FACTORS,
        "low_freq_factor": st.floats(0.5, 2.0),
        "high_freq_factor": st.floats(2.5, 16.0),
        **ORIGINAL,
    }
)
YARN = st.fixed_dictionaries(
    {"rope_type": st.just("yarn"), "factor": FACTORS, **ORIGINAL},
    optional={
        "attention_factor": st.floats(0.1, 3.0),
        "beta_fast": st.floats(4.0, 64.0),
        "beta_slow": st.floats(0.5, 3.0),
        "mscale": st.floats(0.0, 2.0),
        "mscale_all_dim": st.floats(0.1, 2.0),
        "truncate": st.booleans(),
    },
)


def turning(dim: int, **rope: Any) -> Rotary:
    return Rotary(RopeConfig(**rope), dim, CONTEXT)


@given(theta=THETAS, dim=DIMS, scaling=st.one_of(LINEAR, LLAMA3, YARN))
def test_scaled_frequencies_equal_transformers(theta: float, dim: int, scaling: dict[str, Any]) -> None:
    keys = {"max_position_embeddings": CONTEXT, "rope_theta": theta, "rope_scaling": dict(scaling)}
    reference = LlamaConfig(hidden_size=dim, num_attention_heads=1, head_dim=dim, **copy.deepcopy(keys))
    want, magnitude = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](reference)
    got, ours = scaled_frequencies(RopeConfig(**rope_from_hub(HubConfig(keys))), dim, CONTEXT)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=0)
    assert ours == pytest.approx(magnitude, rel=1e-12)


@given(theta=THETAS, dim=DIMS, position=st.integers(0, 100_000))
def test_rotation_is_multiplication_by_a_unit_complex(theta: float, dim: int, position: int) -> None:
    """The pair (x_i, x_{i + D/2}) turns by position theta^(-2i/D); the reference is complex128."""
    x = torch.randn(2, dim, generator=torch_generator(0, "x", dim), dtype=torch.float64)
    cos, sin = turning(dim, theta=theta)(torch.tensor([position]), torch.float64)
    got = torch.complex(*rotate(x, cos, sin).chunk(2, -1))[0]
    angles = position * theta ** (-2 * torch.arange(dim // 2, dtype=torch.float64) / dim)
    want = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    # Angles are float32: their error grows with the position.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6 * (1 + position))


@given(shift=st.integers(0, 500), query=st.integers(0, 500), key=st.integers(0, 500))
def test_scores_depend_on_distance_only(shift: int, query: int, key: int) -> None:
    rotary = turning(16)
    a, b = torch.randn(2, 1, 1, 16, generator=torch_generator(0, "scores"), dtype=torch.float64)

    def score(at: int, other: int) -> torch.Tensor:
        return (
            rotate(a, *rotary(torch.tensor([at]), a.dtype)) * rotate(b, *rotary(torch.tensor([other]), b.dtype))
        ).sum()

    torch.testing.assert_close(score(query + shift, key + shift), score(query, key), rtol=0, atol=2e-3)


def test_yarn_keeps_fast_dimensions_and_interpolates_slow_ones() -> None:
    """The ends of the ramp, and the logits' factor of the paper, 0.1 ln(s) + 1 on queries and on keys."""
    plain, _ = scaled_frequencies(RopeConfig(), 64, CONTEXT)
    scaling = {"kind": "yarn", "factor": 8.0, "original_context": 2048}
    scaled, magnitude = scaled_frequencies(RopeConfig(scaling=scaling), 64, CONTEXT)
    turns = 2048 * plain / (2 * math.pi)
    assert torch.equal(scaled[turns > 64], plain[turns > 64])
    torch.testing.assert_close(scaled[turns < 0.5], plain[turns < 0.5] / 8)
    assert magnitude == pytest.approx(0.1 * math.log(8) + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_frequencies_stay_float32(dtype: torch.dtype) -> None:
    """A cast of the model changes the dtype of cosines and sines but not the angles."""
    rotary = turning(32)
    before = rotary.frequencies.clone()
    positions = torch.arange(3000, 3005)
    cos, _ = rotary(positions, torch.float64)
    rotary.to(dtype)
    assert rotary.frequencies.dtype == torch.float32
    assert torch.equal(rotary.frequencies, before)
    assert torch.equal(rotary(positions, torch.float64)[0], cos)
    assert rotary(positions, dtype)[0].dtype == dtype


def test_frequencies_are_real_on_the_meta_device() -> None:
    """Loading gives memory to parameters only, so a buffer must have its own from the start."""
    with torch.device("meta"):
        rotary = turning(32)
    assert torch.equal(rotary.frequencies, turning(32).frequencies)
    assert torch.equal(rotary.to("meta").frequencies, rotary.frequencies)


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(theta=300.0, fraction=0.5),
        RopeConfig(interleaved=True),
        RopeConfig(scaling=YarnScaling(factor=4, original_context=32)),
        RopeConfig(
            scaling=LongRopeScaling(short=(1,) * 4, long=(2, 3, 4, 5), original_context=64, attention_factor=1.2)
        ),
    ],
)
def test_keys_are_turned_as_the_model_does_and_back(rope):
    config = SHAPE.model_copy(update={"rope": rope, "unrotated_layers": (1,)})
    turns, nothing = rotations(config)
    assert nothing is None and turns is not None
    keys, positions = torch.randn(9, 2, 8, generator=torch_generator(0, "test/rotary")), 7 * torch.arange(9)
    ((cos, sin),) = Rotaries(config, config.context)(positions, torch.float32)
    found = turns.turn(keys, positions[:, None])
    torch.testing.assert_close(found, rotate(keys, cos, sin, rope.interleaved))
    torch.testing.assert_close(turns.back(found, positions[:, None]), keys)
