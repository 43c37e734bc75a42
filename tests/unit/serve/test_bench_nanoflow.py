"""What of the benchmark `nanoflow` runs without a GPU."""

from __future__ import annotations

import pytest
import torch

from penstock.core.bench import Bench, load
from penstock.core.errors import UsageError
from penstock.ops.paged.reference import Reference
from penstock.serve.batching.nanoflow import NanoFlow
from penstock.serve.batching.sarathi import Sarathi
from penstock.serve.build import build_engine
from penstock.serve.config import EngineConfig
from penstock.testing.serve_model import SHAPE, small_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def script():
    return load("nanoflow")


def test_a_cpu_is_refused(script):
    with pytest.raises(UsageError, match="the device is a CPU"):
        script.main(Bench("nanoflow", CPU))


def test_attention_reads_what_the_sequences_hold(script):
    """An empty cache has zeros: with n - 1 of them, the new value v has the weight e^s of n - 1 + e^s."""
    lengths = [1, 16, 17, 40]
    work = script.Operations(SHAPE, Reference(), CPU, torch.float64, 5, lengths)
    got = work.attend().detach()
    key, value = (each.repeat_interleave(SHAPE.heads // SHAPE.kv_heads, 1) for each in (work._key, work._value))
    weight = ((work._query * key).sum(-1, keepdim=True) * SHAPE.head_dim**-0.5).exp()
    others = torch.tensor(lengths).view(-1, 1, 1) - 1
    torch.testing.assert_close(got, value * weight / (others + weight))
    work.multiply()
    assert work.bytes == sum(lengths) * 2 * SHAPE.kv_heads * SHAPE.head_dim * 8
    matrices = SHAPE.matmul_parameters() - SHAPE.vocabulary * SHAPE.hidden
    assert work.flops == 5 * 2 * matrices / SHAPE.layers


def test_both_policies_serve_the_same_requests_on_one_engine(script):
    engine = build_engine(small_model(), EngineConfig(tokens=32, sequences=4, cache_tokens=400, check=True))
    work = script.requests(6, 20, 2, 9, SHAPE.vocabulary)
    for policy in (Sarathi(), NanoFlow(), Sarathi()):
        rate, share = script.serve(engine, policy, work)
        assert rate > 0 and share == 0
        assert engine.memory.pool.held == 0 and not engine.busy
    assert engine.snapshot().output_tokens == 3 * sum(each.sampling.max_tokens for each in work)
    assert len({each.sampling.max_tokens for each in work}) > 1
