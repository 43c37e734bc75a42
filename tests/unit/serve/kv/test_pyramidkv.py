"""Budgets that fall from layer to layer, beside the rule layer by layer; and what the engine makes of them."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import PenstockError
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.kv.policies.contract import Cached
from penstock.serve.kv.policies.pyramidkv import PyramidKV
from penstock.serve.kv.policies.snapkv import SnapKV
from penstock.serve.messages import Request
from penstock.testing.engine.requests import numbers
from penstock.testing.kept_scores import packed_of
from penstock.testing.serve_model import SHAPE, small_model

LAYERS, HEADS, DIM = 5, 2, 8
MODEL = SHAPE.model_copy(update={"layers": LAYERS, "head_dim": DIM})


@pytest.mark.parametrize(
    ("budget", "beta", "tokens", "wanted"),
    [
        # 5 of the window in all layers, and of 20 in the mean beyond that twice as many less a tenth, down to a tenth.
        (25, 10, 1000, [5 + 38, 5 + 29, 5 + 20, 5 + 11, 5 + 2]),
        (25, 1, 1000, [25] * 5),
        (0.25, 10, 100, [5 + 38, 5 + 29, 5 + 20, 5 + 11, 5 + 2]),
        # The first layer would keep 43 of 30, and keeps all: what is over is the others'.
        (25, 10, 30, [30, 27, 25, 22, 20]),
        (4, 10, 1000, [5] * 5),
        (25, 10, 3, [3] * 5),
    ],
)
def test_budgets_worked_out_by_hand(budget, beta, tokens, wanted):
    view = PyramidKV(budget=budget, beta=beta, window=4).fitted(MODEL).view
    assert list(view.counts(tokens)) == wanted
    assert view.places(tokens) == math.ceil(sum(wanted) / LAYERS)


@given(budget=st.one_of(st.integers(2, 80), st.sampled_from([0.1, 0.3, 0.52, 0.7, 0.95])), beta=st.floats(1, 50))
def test_what_is_kept_later_is_there(budget, beta):
    view = PyramidKV(budget=budget, beta=beta, window=4).fitted(MODEL).view
    before = view.counts(1)
    for tokens in range(2, 120):
        after = view.counts(tokens)
        assert all(count <= min(kept + 1, tokens) for count, kept in zip(after, before, strict=True))
        wanted = budget * tokens if budget <= 1 else budget
        assert sum(after) <= LAYERS * max(5, wanted) + 1e-9
        before = after


@given(seed=st.integers(0, 99), budget=st.sampled_from([9, 14, 0.5]))
def test_each_layer_keeps_what_snapkv_keeps_of_it(seed, budget):
    draw, length = torch.Generator().manual_seed(seed), 24
    keys, values = (torch.randn(LAYERS, HEADS, length, DIM, generator=draw) for _ in range(2))
    votes = torch.rand(LAYERS, HEADS, 4, length, generator=draw)
    policy = PyramidKV(budget=budget, beta=10, window=4, pool=3).fitted(MODEL)
    kept = policy.compress(Cached(keys, values, votes), policy.keeps(length))
    packed = packed_of(policy, kept, length)
    assert kept.keys.shape[2] == policy.keeps(length)
    for layer, count in enumerate(policy.view.counts(length)):
        (seen,) = policy.view.seen(layer, torch.zeros(1, 4, DIM), packed, 1.0)
        for head in range(HEADS):
            total = votes[layer, head].sum(0).tolist()
            near = [total[max(0, place - 1) : place + 2] for place in range(length)]
            order = sorted(range(length - 4), key=lambda place: (-math.fsum(near[place]) / len(near[place]), place))
            places = [*sorted(order[: count - 4]), *range(length - 4, length)]
            assert torch.equal(seen.keys[0, :, head], keys[layer, head, places])
            assert torch.equal(seen.values[0, :, head], values[layer, head, places])


def test_what_a_layer_has_not_is_not_kept():
    draw, policy = torch.Generator().manual_seed(0), PyramidKV(budget=14, beta=10, window=4, pool=3).fitted(MODEL)
    missing = policy.view.missing(40)
    assert missing[0] == 0 < missing[-1]
    length = policy.view.counts(40)[0] + 20  # compressed with 40 tokens, and 20 have come since
    keys, values = (torch.randn(LAYERS, HEADS, length, DIM, generator=draw) for _ in range(2))
    votes = torch.rand(LAYERS, HEADS, 4, length, generator=draw)
    kept = [policy.compress(Cached(keys, values, votes, None, 60, missing), policy.keeps(60))]
    for layer, gone in enumerate(missing):
        keys[layer, :, :gone], values[layer, :, :gone], votes[layer, :, :, :gone] = torch.nan, torch.nan, 100.0
    kept.append(policy.compress(Cached(keys, values, votes, None, 60, missing), policy.keeps(60)))
    assert torch.equal(kept[0].keys, kept[1].keys) and torch.equal(kept[0].values, kept[1].values)


def said(kv, **options):
    config, told = EngineConfig(kv=kv, sequences=3, cache_tokens=400, **options), defaultdict(list)
    engine = build_engine(small_model(), config)
    for number in range(3):
        sampling = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
        engine.add(Request(str(number), numbers(f"pyramid {number}", 20 + 7 * number), sampling))
    while engine.busy:
        for delta in engine.step():
            told[delta.id] += delta.tokens
    assert engine.snapshot().dropped_tokens > 0
    return dict(told)


def test_with_equal_budgets_the_tokens_are_those_of_snapkv():
    options = {"budget": 12, "window": 4, "pool": 3, "every": 5}
    assert said(PyramidKV(**options, beta=1)) == said(SnapKV(**options)) != said(PyramidKV(**options))


def test_the_kernel_and_the_readable_backend_read_the_same():
    kv = PyramidKV(budget=12, window=4, pool=3, every=5)
    assert said(kv, attention="cpu", draft="ngram") == said(kv, attention="reference", draft="ngram")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kv": {"name": "pyramidkv"}, "codec": "fp8"}, r"tokens of some layers in the places of others.*own.*bf16"),
        ({"kv": {"name": "pyramidkv"}, "attention": "invariant"}, "views of compressed caches"),
    ],
)
def test_what_it_does_not_go_together_with(options, reason):
    with pytest.raises(PenstockError, match="(?s)" + reason):
        build_engine(small_model(), EngineConfig(**options))
