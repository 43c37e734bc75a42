"""Contexts that are moved: which tokens are computed again, keys at other positions, what is cached, and where."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections import OrderedDict

import numpy as np
import pytest
import torch

from penstock import LLM, SamplingParams
from penstock.cli._engine import Asked
from penstock.core.errors import UsageError
from penstock.core.progress import silent
from penstock.models.config import (
    DecoderConfig,
    LatentConfig,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    YarnScaling,
)
from penstock.models.decoder import Decoder
from penstock.models.invariant import make_invariant
from penstock.models.paged import cache_shape
from penstock.ops.attention import attend_rows, causal_mask
from penstock.ops.paged.codecs.int8 import Int8
from penstock.ops.paged.reference import Reference
from penstock.policy import create
from penstock.serve.build import build_engine, build_runner
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.kv.chunks import Chunks, chunks_of
from penstock.serve.kv.disk import DiskBlocks
from penstock.serve.kv.host import HostBlocks
from penstock.serve.kv.moving import Move, Mover
from penstock.serve.kv.pool import BlockPool
from penstock.serve.kv.reuse.cache_craft import CacheCraft, reuse_score
from penstock.serve.kv.reuse.contract import ChunkCache, Neighbour
from penstock.serve.kv.reuse.prefix import PrefixReuse
from penstock.serve.kv.simulator import play
from penstock.serve.kv.tiers import Tiers
from penstock.serve.messages import Request
from penstock.testing.at_once import AtOnce
from penstock.testing.kv_reuse import BEFORE, BEHIND, CONTEXTS, answered, opened
from penstock.testing.serve_model import SHAPE, small_model

CRAFT = CacheCraft()


def named(order: str, length: int = 4) -> tuple[Neighbour, ...]:
    """Texts that are called by letters, in a row."""
    return tuple(Neighbour(letter.encode(), place * length, length) for place, letter in enumerate(order))


def cached(order: str, drawn: list[list[float]]) -> ChunkCache:
    table = np.array(drawn, np.float32)
    return ChunkCache([1] * len(table), 4 * len(order), b"", b"", named(order), table)


# Which tokens are computed again


@pytest.mark.parametrize(
    ("old", "new", "score"),
    [
        ("ab", "ab", 1.0),
        ("ab", "ba", 0.0),  # the only pair is in the other order
        ("ab", "b", 0.25),
        ("ab", "a", 0.75),
        ("ab", "abcd", 0.5),  # half of what stands there is new
        ("ab", "cd", 0.0),
        ("ab", "", 0.0),
        ("", "ab", 0.0),
        ("abc", "acb", 2 / 3),
    ],
)
def test_the_reuse_score_by_hand(old, new, score):
    shares = {"ab": [0.6, 0.2], "": [], "abc": [0.6, 0.2, 0.1]}[old]
    assert reuse_score(cached(old, [shares] * 2), named(new)) == pytest.approx(score)


def brute_force(recompute: float, drawn: np.ndarray, score: float, gone: list[int]) -> list[int]:
    """As the policy says it, token by token."""
    scores = [sum(float(row[place]) for place in gone) for row in drawn]
    wanted = math.ceil(len(drawn) * (1 - (1 - recompute) ** (1 - score)) - 1e-9)
    return sorted(sorted(range(len(drawn)), key=lambda token: (-scores[token], token))[:wanted])


@pytest.mark.parametrize("recompute", [0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_tokens_that_looked_at_what_is_gone_are_computed_again(recompute):
    draw, policy = np.random.default_rng(3), CacheCraft(recompute=recompute)
    for order in ("ab", "ba", "ac", "cab", "abd", "d", "abc"):
        cache = cached("abc", draw.dirichlet([0.5, 0.5, 0.5, 2.0], 20)[:, :3].tolist())
        before = named(order)
        gone = [place for place, each in enumerate("abc") if each != order[place : place + 1]] or [0, 1, 2]
        wanted = brute_force(recompute, cache.drawn, reuse_score(cache, before), gone)
        assert policy.renewed(cache, 99, before).tolist() == wanted, order
    assert policy.renewed(cache, 99, named("de")).size == math.ceil(round(20 * recompute, 9))


# Keys at other positions

ROPES = {
    "plain": {},
    "linear": {"rope": RopeConfig(scaling=LinearScaling(factor=4))},
    "llama3": {
        "rope": RopeConfig(
            scaling=Llama3Scaling(factor=8, low_frequency_factor=1, high_frequency_factor=4, original_context=64)
        )
    },
    "yarn": {"rope": RopeConfig(scaling=YarnScaling(factor=4, original_context=32))},
    "longrope": {
        "rope": RopeConfig(
            scaling=LongRopeScaling(short=(1, 1, 1, 2), long=(1, 2, 3, 4), original_context=32, attention_factor=1.2)
        )
    },
    "half of a head, neighbours": {"rope": RopeConfig(fraction=0.5, interleaved=True)},
    "normed heads": {"qk_norm": "head"},
    "normed behind the rotation": {"qk_norm": "turned"},
    "no rotation": {"unrotated_layers": (0,)},
    "two rotations": {"window": 6, "windowed_layers": (0,), "local_rope": RopeConfig(theta=100)},
    "chunks": {"window": 8, "chunked": True},
    "sinks and a bound": {"sinks": True, "attention_cap": 3.0},
    "latent": {"latent": LatentConfig(rank=12, rotated=4, plain=6, value=5)},
    "latent, neighbours": {
        "latent": LatentConfig(rank=12, rotated=4, plain=6, value=5),
        "rope": RopeConfig(interleaved=True),
    },
}


def shaped(name: str, layers: int) -> Decoder:
    config = DecoderConfig.model_validate({**SHAPE.model_dump(), "layers": layers, **ROPES[name]})
    model = Decoder(config).initialize(0).double().eval()
    model.expect(config.context)
    return model


@dataclasses.dataclass
class Seen:
    """An attention context for a whole text from any position on, which notes its keys, by layer [n, K, D]."""

    positions: torch.Tensor
    keys: list[torch.Tensor] = dataclasses.field(default_factory=list)
    keeps: bool = True

    def attend(self, layer, query, key, value, *, scale, window, extras=()):
        self.keys.append(key)
        places = self.positions - self.positions[0]
        mask = causal_mask(places, places, window)
        rows = (each.unsqueeze(0) for each in (query, key, value))
        return attend_rows(*rows, scale=scale, mask=mask[None, None])[0]


@pytest.mark.parametrize("name", [name for name in ROPES if name not in ("chunks", "sinks and a bound")])
@torch.no_grad()
def test_moved_keys_are_those_of_the_text_at_the_other_place(name):
    """Attention looks at distances alone: a text by itself has the same hidden states wherever it begins."""
    model, text = shaped(name, 2), torch.tensor(CONTEXTS[0])
    found = []
    for first in (5, 60, 0):
        rows = Seen(torch.arange(first, first + len(text)))
        model(text, rows)
        found.append(torch.stack(rows.keys).transpose(1, 2))
    shape = cache_shape(model.config, 4, torch.float64, torch.device("cpu"), blocks=2)
    mover = Mover(Reference().open(shape), model.config, model.rotary)
    places = torch.arange(len(text))
    for keys, first in ((found[1], 60), (found[2], 0)):
        moved = mover.turned(found[0], 5 + places, first + places)
        assert (moved - keys).abs().max() < 1e-5
    turns = any(model.config.rope_of(layer) for layer in range(2))
    assert not turns or (found[0] - found[1]).abs().max() > 0.1
    assert torch.equal(mover.turned(found[0], places, places).round(decimals=9), found[0].round(decimals=9))


@pytest.mark.parametrize("name", ROPES)
def test_with_one_layer_nothing_needs_to_be_computed_again(name):
    """Its keys and values depend on the token and its position alone."""
    told = []
    for policy in (CacheCraft(recompute=0), PrefixReuse()):
        config = EngineConfig(
            kv_reuse=policy, attention=Reference(), sequences=4, block_size=4, cache_tokens=200, check=True
        )
        engine = build_engine(shaped(name, 1), config)
        told.append([answered(engine, chosen)[1] for chosen in (CONTEXTS[:3], CONTEXTS[2::-1], CONTEXTS[1:3])])
    assert np.allclose(*told, rtol=0, atol=1e-5)
    assert engine.snapshot().reused_tokens == 0
    moving = build_engine(shaped(name, 1), config.model_copy(update={"kv_reuse": CacheCraft(recompute=0)}))
    for chosen in (CONTEXTS[:3], CONTEXTS[2::-1]):
        answered(moving, chosen)
    assert moving.snapshot().reused_tokens == sum(map(len, CONTEXTS[:3]))


def test_codes_of_values_move_as_they_are():
    shape = cache_shape(SHAPE, 4, torch.float32, torch.device("cpu"), Int8(), blocks=8)
    cache = Reference().open(shape)
    keys, values = torch.randn(2, 2, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    slots, targets = torch.arange(9), torch.arange(20, 29)
    cache.write(slots, keys, values)
    mover, places = Mover(cache, SHAPE, small_model().rotary), np.arange(9)
    mover.move(Move(places, places + 20, places, places + 31))
    old, new = cache.codes(slots), cache.codes(targets)
    assert torch.equal(old[1], new[1]) and not torch.equal(old[0], new[0])
    step = keys.abs().amax(-1, keepdim=True) / 127
    back = mover.turned(cache.read(targets)[0], torch.from_numpy(places + 31), torch.from_numpy(places))
    assert ((back - keys).norm(dim=-1, keepdim=True) <= 2 * step * math.sqrt(8)).all()
    mover.move(Move(places, places + 20, places, places))
    assert all(torch.equal(one, other) for one, other in zip(cache.codes(slots), cache.codes(targets), strict=True))


# What is cached, and where


def test_all_computed_again_is_bit_for_bit_the_prompt_in_a_row():
    told = []
    for policy in (CacheCraft(recompute=1), PrefixReuse()):
        config = EngineConfig(kv_reuse=policy, cache_tokens=400, block_size=4, sequences=4)
        # Products whose bits depend neither on how many rows there are, nor on which kernels a pass may take.
        engine = build_engine(make_invariant(copy.deepcopy(small_model())), config)
        told.append([answered(engine, chosen) for chosen in (CONTEXTS[:3], CONTEXTS[2::-1], CONTEXTS[1:4])])
    assert told[0] == told[1]


def moved(engine: Engine, contexts: list[list[int]], before: list[int] = BEFORE) -> tuple[int, int]:
    """How many tokens of ``contexts`` a request takes, and computes again."""
    past = engine.snapshot()
    answered(engine, contexts, before)
    now = engine.snapshot()
    return now.reused_tokens - past.reused_tokens, now.renewed_tokens - past.renewed_tokens


def test_behind_the_same_texts_nothing_is_computed_again():
    engine = opened(CRAFT)
    assert moved(engine, CONTEXTS[:3]) == (0, 0)
    # What of it ends a block is found in the prefix tree; the first two contexts end within one.
    reused, renewed = moved(engine, [*CONTEXTS[:2], CONTEXTS[5]])
    shared = len([*BEFORE, *CONTEXTS[0], *CONTEXTS[1]])
    assert (reused, renewed) == (shared % 4, 0)
    reused, renewed = moved(engine, [CONTEXTS[0], CONTEXTS[2], CONTEXTS[1]])
    assert renewed > 0 and reused + renewed < len([*CONTEXTS[0], *CONTEXTS[1], *CONTEXTS[2]])
    # What stands behind contexts that were moved depends on them, and not on what stood there before.
    assert moved(engine, [CONTEXTS[0], CONTEXTS[2], CONTEXTS[3]])[1] > 0


def test_contexts_come_back_from_the_host_and_from_disk(tmp_path):
    config = EngineConfig(
        kv_reuse=CRAFT, attention=Reference(), sequences=4, block_size=4, cache_tokens=160, tokens=64, check=True
    )
    wanted = opened(CRAFT)
    expected = [moved(wanted, CONTEXTS[:3]), moved(wanted, CONTEXTS[2::-1])]
    for places, folder in ((400, None), (24, tmp_path)):
        runner = build_runner(small_model(), config)
        disk = None if folder is None else DiskBlocks(folder, "contexts", 1 << 22)
        engine = Engine(config, runner, tiers=Tiers(HostBlocks(runner.cache, places), disk, AtOnce()))
        assert moved(engine, CONTEXTS[:3]) == expected[0]
        for number in range(12):  # others want the room
            engine.add(Request(f"other {number}", [number + 1] * 40, SamplingParams(temperature=0, max_tokens=2)))
            while engine.busy:
                engine.step()
        found = engine.snapshot().tier_hits
        assert moved(engine, CONTEXTS[2::-1]) == expected[1]
        now = engine.snapshot().tier_hits
        assert now[0] > found[0] and (now[1] > found[1]) == (folder is not None)
        engine.close()


def test_contexts_that_have_left_are_computed_and_cached_anew():
    config = EngineConfig(kv_reuse=CRAFT, attention=Reference(), sequences=4, block_size=4, cache_tokens=120, tokens=64)
    engine = build_engine(small_model(), config)
    answered(engine, CONTEXTS[:2])
    for number in range(8):
        engine.add(Request("other", [number + 1] * 60, SamplingParams(temperature=0, max_tokens=2)))
        while engine.busy:
            engine.step()
    assert moved(engine, CONTEXTS[1::-1]) == (0, 0)
    assert sum(moved(engine, CONTEXTS[:2])) == len([*CONTEXTS[0], *CONTEXTS[1]])


def zipf(texts: int, length: int, count: int) -> list[list[int]]:
    """Texts of so many tokens, the i-th of which is i times rarer than the first."""
    chances = 1 / np.arange(1, texts + 1)
    chosen = np.random.default_rng(0).choice(texts, count, p=chances / chances.sum())
    return [[100 + int(number)] * length for number in chosen]


def hit_rate(trace: list[list[int]], blocks: int, size: int, eviction: str) -> float:
    """Of requests for one context each, the share that finds it, in a pool that has nothing else."""
    pool = BlockPool(blocks, size, create("kv.eviction", eviction).start)
    chunks, hits = Chunks(pool, CRAFT, pool.take), 0
    for text in trace:
        asked = chunks_of([*text, 1], [0, len(text)], b"")
        taken = chunks.find(asked, 0, 0)
        for each in taken:
            chunks.move(each, each.places)
        if not taken:
            chunks.keep(asked, np.arange(len(text)))
            chunks.learn(asked)
        chunks.told()
        pool.check([])
        hits += bool(taken)
    return hits / len(trace)


@pytest.mark.parametrize("room", [8, 20])
def test_hits_on_a_zipf_trace_are_those_of_the_model(room):
    trace = zipf(60, 12, 1500)
    for eviction in ("lru", "gdsf", "lec"):
        model = play(trace, 3 * room, 4, create("kv.eviction", eviction).start).rate
        assert hit_rate([text[:-1] for text in trace], 3 * room, 4, eviction) == pytest.approx(model)
    recent: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for text in trace:
        hits += text[0] in recent
        recent[text[0]] = None
        recent.move_to_end(text[0])
        if len(recent) > room:
            recent.popitem(last=False)
    lru = hit_rate(trace, 3 * room, 4, "lru")
    assert lru == pytest.approx(hits / len(trace))
    # Che's approximation: a context is there if it was asked for within the time in which as many come as there is
    # room for.
    chances = 1 / np.arange(1, 61)
    chances /= chances.sum()
    time = next(each for each in itertools.count(1) if (1 - np.exp(-chances * each)).sum() >= room)
    assert lru == pytest.approx(float((chances * (1 - np.exp(-chances * time))).sum()), abs=0.03)


def test_a_request_that_is_let_in_again_takes_what_it_took_first():
    pool = BlockPool(40, 4)
    chunks, own, moved = Chunks(pool, CRAFT, pool.take), [7] * 9, [8] * 6
    mine, others = chunks_of([1, *own, *moved, 2], [1, 10, 16], b""), chunks_of([3, *own, 2], [1, 10], b"")
    assert chunks.find(mine, 0, 0) == []
    chunks.find(others, 0, 0)
    chunks.keep(others, np.arange(11))
    others[0].learn(1, np.ones((9, 1), np.float32))
    chunks.learn(others)
    chunks.told()
    assert chunks.find(mine, 0, 0) == []  # as it was read by the request itself, when it was admitted first
    fresh = chunks_of([1, *own, *moved, 2], [1, 10, 16], b"")
    (taken,) = chunks.find(fresh, 0, 0)
    assert taken.chunk is fresh[0] and not taken.whole and len(taken.places) == 6
    chunks.move(taken, taken.places)
    chunks.told()
    (again,) = chunks.find(fresh, 0, 0)
    assert again.cache is taken.cache and again.places.tolist() == taken.places.tolist()
    pool.release(again.blocks)
    pool.check([])


def test_contexts_are_found_under_the_same_adapter_alone():
    pool = BlockPool(12, 4)
    chunks, text = Chunks(pool, CRAFT, pool.take), [7] * 9
    for root in (b"", b"an adapter", b"another"):
        asked = chunks_of(text, [0, 8], root)
        assert chunks.find(asked, 0, 0) == []
        chunks.keep(asked, np.arange(8))
        chunks.learn(asked)
        chunks.told()
    held = [chunks.find(chunks_of(text, [0, 8], root), 0, 0)[0].blocks for root in (b"", b"an adapter", b"another")]
    assert len({block for blocks in held for block in blocks}) == 6


def test_what_is_known_of_contexts_that_have_left_is_forgotten():
    pool = BlockPool(6, 4)
    chunks = Chunks(pool, CRAFT, pool.take)
    for number in range(50):
        asked = chunks_of([number] * 9, [0, 8], b"")
        chunks.keep(asked, np.arange(8))
        chunks.learn(asked)
        chunks.told()
    assert len(chunks._caches) <= 6


# What users say


def test_llm_counts_what_it_finds():
    llm = LLM("python-1m", device="cpu", kv_reuse="cache_craft", sequences=8, tokens=64, cache_tokens=1024, check=True)
    documents = ["def area(w, h):\n    return w * h\n", "class Stack:\n    items = []\n", "import os\n"]
    params = SamplingParams(temperature=0, max_tokens=8)
    results = [
        llm.generate("def f(", params, contexts=order, prefix="# code\n", progress=silent)[0]
        for order in (documents, documents[::-1], documents[::-1])
    ]
    assert results[0].num_cached_tokens == 0
    assert 0 < results[1].num_cached_tokens < results[1].num_context_tokens
    assert results[1].outputs[0].text == results[2].outputs[0].text
    (several,) = llm.generate(
        "def f(", params.model_copy(update={"n": 2}), contexts=documents[::-1], prefix="# code\n", progress=silent
    )
    assert {output.text for output in several.outputs} == {results[1].outputs[0].text}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv": "h2o"}, "does not keep it as it is"),
        ({"record": "steps.bin"}, "record needs kv_reuse = prefix"),
        ({"tensor_parallel": 2}, "kv_reuse = cache_craft is for a model on one device"),
        ({"deterministic": True}, "deterministic does not go together with kv_reuse = cache_craft"),
        ({"kv_reuse": {"name": "cache_craft", "recompute": 1.5}}, "recompute"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises((ValueError, UsageError), match=message):
        build_engine(
            small_model(), EngineConfig.model_validate({"kv_reuse": "cache_craft", "cache_tokens": 100, **options})
        )


def test_a_model_whose_positions_are_learned_is_refused():
    model = Decoder(SHAPE.model_copy(update={"learned_positions": True})).initialize(0).eval()
    with pytest.raises(UsageError, match="its positions are added to the embedding") as raised:
        build_engine(model, EngineConfig(kv_reuse=CRAFT, cache_tokens=100))
    assert "kv_reuse = prefix" in str(raised.value)


def test_nobody_goes_on_from_a_text_with_moved_contexts():
    engine = opened(CRAFT, draft="ngram")
    given = {"contexts": CONTEXTS[:2], "shared": len(BEFORE)}
    params = SamplingParams(temperature=0, max_tokens=8)
    with pytest.raises(UsageError, match="cannot be kept"):
        engine.add(Request("kept", [*BEFORE, *BEHIND], params, keep=True, **given))
    engine.add(Request("a", [*BEFORE, *BEHIND], params, **given))
    engine.step()
    with pytest.raises(UsageError, match="or moved"):
        engine.fork("a", Request("b", [*BEFORE, *BEHIND, 1], params))
    while engine.busy:
        engine.step()
    assert engine.snapshot().drafted_tokens == engine.snapshot().held == 0


def test_the_command_line_says_how_much():
    given = {"kv_reuse": "cache_craft", "kv_recompute": 0.2}
    assert Asked(given, ()).config().kv_reuse == CacheCraft(recompute=0.2)
    assert Asked({"kv_reuse": "cache_craft"}, ()).config().kv_reuse == CRAFT
    with pytest.raises(UsageError, match=r"--kv-recompute 0\.2") as raised:
        Asked({"kv_recompute": 0.2}, ()).config()
    assert "--kv-reuse, such as cache_craft" in str(raised.value)
