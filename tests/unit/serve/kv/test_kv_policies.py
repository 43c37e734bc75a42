"""What each policy keeps, beside its rule token by token; and what the engine makes of it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import PenstockError, UsageError
from penstock.models.decoder import Decoder
from penstock.policy import create
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.kv.compaction import attention
from penstock.serve.kv.policies.contract import Cached, with_newest
from penstock.serve.kv.policies.h2o import HeavyHitters
from penstock.serve.kv.policies.kv_merger import KVMerger
from penstock.serve.kv.policies.scissorhands import Scissorhands
from penstock.serve.kv.policies.sink_window import SinkWindow
from penstock.serve.kv.policies.snapkv import SnapKV
from penstock.serve.messages import Request
from penstock.testing.kept_scores import shares_of
from penstock.testing.serve_model import SHAPE, small_model

LENGTH = 24


def cached(seed: int, queries: int = 6, length: int = LENGTH) -> Cached:
    """One head, in which the last queries see the tokens before them and themselves."""
    draw = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(length, 4, generator=draw) for _ in range(2))
    seen = torch.ones(queries, length, dtype=torch.bool).tril(length - queries)
    shares = torch.rand(queries, length, generator=draw).masked_fill(~seen, 0)
    return Cached(keys, values, shares / shares.sum(-1, keepdim=True), torch.rand(length, generator=draw))


def best(scores: list[float], newest: int, count: int) -> list[int]:
    """Places of the newest tokens, and of the others with the highest scores."""
    early = sorted(range(LENGTH - newest), key=lambda place: (-scores[place], place))[: count - newest]
    return [*sorted(early), *range(LENGTH - newest, LENGTH)]


@given(seed=st.integers(0, 99), count=st.integers(5, 20))
def test_sinks_and_the_newest(seed, count):
    places = SinkWindow(sinks=3).select(cached(seed), count).tolist()
    assert places == [0, 1, 2, *range(LENGTH - count + 3, LENGTH)]


@given(seed=st.integers(0, 99), count=st.integers(2, 20))
def test_heavy_hitters_and_the_newest(seed, count):
    row = cached(seed)
    scores = [float(row.drawn[place] + sum(share[place] for share in row.attention)) for place in range(LENGTH)]
    policy = HeavyHitters(recent=0.25)
    places = best(scores, round(0.25 * count), count)
    assert policy.select(row, count).tolist() == places
    kept = policy.compress(row, count)
    torch.testing.assert_close(kept.drawn, torch.tensor([scores[place] for place in places]))
    assert torch.equal(kept.keys, row.keys[places]) and torch.equal(kept.values, row.values[places])


@given(seed=st.integers(0, 99), count=st.integers(6, 20))
def test_those_that_were_below_the_average_most_often_go(seed, count):
    row = cached(seed)
    often = [0] * LENGTH
    for number, share in enumerate(row.attention.tolist()):
        seen = LENGTH - len(row.attention) + number + 1
        for place in range(seen):
            often[place] += share[place] * seen >= 1
    assert Scissorhands(recent=4, history=6).select(row, count).tolist() == best(often, 4, count)


@given(seed=st.integers(0, 99), count=st.integers(8, 20))
def test_votes_of_neighbours_are_averaged(seed, count):
    row = cached(seed)
    votes = row.attention.sum(0).tolist()
    pooled = [math.fsum(own := votes[max(0, place - 2) : place + 3]) / len(own) for place in range(LENGTH)]
    assert SnapKV(window=6, pool=5).select(row, count).tolist() == best(pooled, 6, count)


@given(seed=st.integers(0, 99), count=st.integers(5, 20))
def test_runs_of_like_keys_become_their_weighted_means(seed, count):
    row, recent = cached(seed), 3
    alike = torch.cosine_similarity(row.keys[:-1], row.keys[1:], -1).tolist()
    linked = sorted(range(LENGTH - 1 - recent), key=lambda place: (-alike[place], place))[: LENGTH - count]
    runs: list[list[int]] = []
    for place in range(LENGTH):
        if place and place - 1 in linked:
            runs[-1].append(place)
        else:
            runs.append([place])
    heat = row.attention.sum(0)
    kept = KVMerger(recent=recent, window=6).compress(row, count)
    for number, run in enumerate(runs):
        pivot = max(run, key=lambda place: (float(heat[place]), -place))
        far = [math.dist(row.keys[place].tolist(), row.keys[pivot].tolist()) for place in run]
        width = math.fsum(far) / len(far) / math.sqrt(2)
        weights = torch.tensor([math.exp(-(each**2) / (2 * width**2)) if width else 1.0 for each in far])
        weights /= weights.sum()
        torch.testing.assert_close(kept.keys[number], weights @ row.keys[run])
        torch.testing.assert_close(kept.values[number], weights @ row.values[run])


def test_identical_neighbours_merge_to_themselves():
    row = cached(0)
    row.keys[4:9], row.values[4:9] = row.keys[4].clone(), row.values[4].clone()
    kept = KVMerger(recent=3, window=6).compress(row, LENGTH - 4)
    torch.testing.assert_close(kept.keys, torch.cat([row.keys[:5], row.keys[9:]]))
    torch.testing.assert_close(kept.values, torch.cat([row.values[:5], row.values[9:]]))


@pytest.mark.parametrize("policy", [HeavyHitters(), Scissorhands(recent=2, history=6), SnapKV(window=2, pool=1)])
def test_planted_heavy_hitters_stay(policy):
    row = cached(3)
    row.attention[:, [2, 11]] += 1
    row.attention.div_(row.attention.sum(-1, keepdim=True))
    assert {2, 11} <= set(policy.select(row, 8).tolist())


def test_of_equal_scores_the_earlier_stays():
    assert with_newest(torch.zeros(2, 6), 4, 1).tolist() == [[0, 1, 2, 5]] * 2


def test_attention_of_the_last_queries_is_that_of_the_definition():
    draw = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 3, 6, 4, generator=draw), torch.randn(2, 2, 9, 4, generator=draw)
    found = attention(queries, keys, torch.tensor([0.5, 2.0]).view(-1, 1, 1, 1, 1))
    for layer, scale in enumerate((0.5, 2.0)):
        wanted = shares_of(queries[layer].double(), keys[layer].double(), scale)
        torch.testing.assert_close(found[layer], wanted)


@pytest.mark.parametrize("backend", ["reference", "cpu", "invariant"])
def test_every_backend_on_the_cpu_compresses_alike(backend):
    said = {}
    for name in (backend, "reference"):
        config = EngineConfig(
            kv=HeavyHitters(budget=0.4, every=4),
            attention=create("attention.paged", name),
            deterministic=name == "invariant",
            tokens=16,
            sequences=4,
            block_size=4,
            cache_tokens=400,
            check=True,
        )
        engine, told = build_engine(Decoder(SHAPE).initialize(0).eval(), config), {}
        for number in range(3):
            prompt = [(7 * place + number) % SHAPE.vocabulary for place in range(15 + number)]
            engine.add(Request(str(number), prompt, SamplingParams(temperature=0, max_tokens=20)))
        while engine.busy:
            for delta in engine.step():
                told.setdefault(delta.id, []).extend(delta.tokens)
        said[name] = told
    assert said[backend] == said["reference"]


def test_codecs_and_policies_go_together():
    """What a request says is the same alone and beside others, also where what stays is coded once more."""
    config = EngineConfig(
        kv=HeavyHitters(budget=0.4, every=4),
        codec="int8",
        tokens=16,
        sequences=4,
        block_size=4,
        cache_tokens=400,
        check=True,
    )
    engine = build_engine(Decoder(SHAPE).initialize(0).eval(), config)
    prompts = [[(7 * place + number) % SHAPE.vocabulary for place in range(15 + number)] for number in range(4)]

    def said(numbers: list[int]) -> dict[str, list[int]]:
        told: dict[str, list[int]] = {}
        for number in numbers:
            engine.add(Request(str(number), prompts[number], SamplingParams(temperature=0, max_tokens=20)))
        while engine.busy:
            for delta in engine.step():
                told.setdefault(delta.id, []).extend(delta.tokens)
        return told

    together = said([0, 1, 2, 3])
    assert all(said([number])[str(number)] == together[str(number)] for number in range(4))


def test_more_requests_fit_than_with_the_full_cache():
    """A pool for three prompts and what follows: with a quarter of them kept, no sequence is ever preempted."""
    preempted = {}
    for name in ("full", "sink_window"):
        kv = {"name": "full"} if name == "full" else {"name": name, "budget": 0.25, "every": 8}
        config = EngineConfig(kv=kv, tokens=64, sequences=8, block_size=4, cache_tokens=208, check=True)
        engine = build_engine(small_model(), config)
        for number in range(8):
            prompt = [(5 * place + number) % SHAPE.vocabulary for place in range(40)]
            engine.add(Request(str(number), prompt, SamplingParams(temperature=0, max_tokens=40)))
        most = 0
        while engine.busy:
            engine.step()
            most = max(most, engine.snapshot().running)
        preempted[name] = engine.snapshot().preemptions, most
    assert preempted["full"][0] > 0
    assert preempted["sink_window"][0] == 0
    assert preempted["sink_window"][1] > preempted["full"][1]


def test_a_model_with_windows_is_refused():
    model = Decoder(SHAPE.model_copy(update={"window": 8})).initialize(0).eval()
    with pytest.raises(UsageError, match=r"h2o.*windows") as raised:
        build_engine(model, EngineConfig(kv=HeavyHitters(), cache_tokens=100))
    assert "full" in raised.value.hint


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        ({"name": "h2o", "budget": 1.5}, "neither a share nor a number of tokens"),
        ({"name": "h2o", "budget": 0}, "greater than 0"),
        ({"name": "snapkv", "pool": 4}, "odd"),
        ({"name": "scissorhands", "history": 90}, "every 64"),
    ],
)
def test_what_makes_no_sense_is_refused(kv, message):
    with pytest.raises((PenstockError, ValueError), match=message):
        EngineConfig(kv=kv)


def test_a_model_cannot_draft_on_tables_that_are_compressed():
    with pytest.raises((PenstockError, ValueError), match="ngram"):
        EngineConfig(kv={"name": "h2o"}, draft="python-1m")
