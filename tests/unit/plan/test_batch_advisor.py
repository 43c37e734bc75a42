"""The advisor of batches against closed forms [240], and its command."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from penstock.cli import build_app
from penstock.core.errors import UsageError
from penstock.models.config import DecoderConfig, MoEConfig
from penstock.models.decoder import Decoder
from penstock.plan.batch.knee import Knee
from penstock.plan.decoding import DecodeCost
from penstock.plan.hardware import DEVICES, Hardware

MODEL = DecoderConfig(vocabulary=100, hidden=32, layers=3, heads=4, kv_heads=2, head_dim=8, ffn=48, tied=False)


@given(
    weights=st.integers(1, 10**6),
    cache=st.integers(1, 10**4),
    flops=st.integers(1, 10**4),
    share=st.floats(0.05, 0.99),
)
def test_the_knee_of_a_roofline_is_where_algebra_puts_it(weights, cache, flops, share):
    """With times W for the weights, k a sequence for its cache, c for its arithmetic, a batch b gives
    b / max(bc, W + bk) tokens/s. That reaches the share s of 1 / m at b = sW / (m - sk), where m is the slope that
    is left when b is large, max(c, k)."""
    cost = DecodeCost(Hardware(flops=1, bandwidth=1, memory=1e15), weights, cache, flops, reserve=0)
    m = max(flops, cache)
    exact = share * weights / (m - share * cache)
    assume(abs(exact - round(exact)) > 1e-6)
    # Memory for so many that the largest batch has all but a billionth of the limit.
    assume(cost.largest > 1e9 * exact)
    assert Knee(share=share).advise(cost).batch == max(1, math.ceil(exact))


def test_where_arithmetic_is_the_limit_the_plateau_begins_at_the_ridge():
    cost = DecodeCost(Hardware(flops=1, bandwidth=1, memory=1e6), weights=1000, cache=1, flops=11, reserve=0)
    advice = Knee(share=1.0).advise(cost)
    assert advice.batch == 100
    assert cost.seconds(100) == 1100
    assert advice.throughput == advice.ceiling == pytest.approx(1 / 11)


def test_a_time_between_tokens_caps_the_batch():
    cost = DecodeCost(Hardware(flops=1e9, bandwidth=1, memory=1e6), weights=100, cache=2, flops=1, reserve=0)
    assert Knee(share=1.0).advise(cost, slowest=150).batch == 25
    with pytest.raises(UsageError, match="a token every 101 s"):
        Knee().advise(cost, slowest=101)


def test_attention_s_intensity_does_not_grow_with_the_batch():
    """Which is why the curve ends at the bandwidth and not at the arithmetic (the paper's observation)."""
    cost = DecodeCost.of(MODEL, DEVICES["h100"], length=4096)
    attention = 4 * MODEL.heads * MODEL.head_dim * MODEL.layers * 4096
    assert [b * attention / (b * cost.cache) for b in (1, 64, 4096)] == pytest.approx(
        [MODEL.heads / MODEL.kv_heads] * 3
    )
    assert cost.seconds(10**6) == pytest.approx((cost.weights + 10**6 * cost.cache) / DEVICES["h100"].bandwidth)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("moe", [None, MoEConfig(experts=6, ffn=20, shared_ffn=16, shared_gate=True)])
def test_weights_are_counted_as_they_are_stored(tied, moe):
    model = MODEL.model_copy(update={"tied": tied, "moe": moe})
    matrices = sum(each.numel() for each in Decoder(model).parameters() if each.dim() > 1)
    assert model.stored_parameters() == matrices


def run(*arguments: str) -> str:
    done = CliRunner().invoke(build_app(), ["plan", "batch", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_command_says_what_to_set():
    found = json.loads(run("python-1m", "--device", "h200", "--length", "512", "--json"))
    assert found["cache_tokens"] == 512 * found["batch"]
    assert 0.9 <= found["share_of_highest"] < 0.95
    assert found["replicas"] >= 1
    assert f"--set sequences={found['batch']} --set cache_tokens={found['cache_tokens']}" in run(
        "python-1m", "--device", "h200", "--length", "512"
    )
    limited = json.loads(run("python-1m", "--tpot", "0.002", "--json"))
    assert limited["tpot_ms"] <= 0.002


def test_an_unknown_device_is_named():
    with pytest.raises(UsageError, match="did you mean"):
        run("python-1m", "--device", "h10")
