"""What is kept of keys and values in low rank and on the host, beside the paper's rule by brute force; and what the
engine makes of it."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from penstock.core.errors import PenstockError, UsageError
from penstock.models.config import DecoderConfig, RopeConfig, YarnScaling
from penstock.models.decoder import Decoder
from penstock.ops.paged.shadow import best_chunks
from penstock.ops.paged.view import Packed
from penstock.serve import sizing
from penstock.serve.build import build_engine, build_runner
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.kv.policies.contract import Cached, Kept
from penstock.serve.kv.policies.shadow import ShadowKV
from penstock.serve.messages import Request
from penstock.testing.kept_scores import packed_of
from penstock.testing.paged_scene import attention
from penstock.testing.reference import greedy
from penstock.testing.serve_model import SHAPE, small_model

LAYERS, HEADS, DIM, CHUNK, RECENT = 2, 2, 8, 4, 3
MODEL = SHAPE.model_copy(update={"layers": LAYERS, "unrotated_layers": (1,)})
SMALL = {"every": 4, "chunk": CHUNK, "outliers": 2, "recent": RECENT}


def policy(model: DecoderConfig = MODEL, **options: object) -> ShadowKV:
    fitted = ShadowKV.model_validate({**SMALL, **options}).fitted(model)
    assert isinstance(fitted, ShadowKV)
    return fitted


def drawn(seed: int, length: int, *, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Keys, turned in the first layer, and values; the keys of all heads are of ``rank`` before that."""
    draw = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(LAYERS, HEADS, length, DIM, generator=draw) for _ in range(2))
    if rank is not None:
        factors, basis = (torch.randn(LAYERS, *size, generator=draw) for size in ((length, rank), (rank, HEADS * DIM)))
        keys = (factors @ basis).view(LAYERS, length, HEADS, DIM).transpose(1, 2)
    keys[0] = turned(keys[0], 1)
    return keys, values


def turned(keys: Tensor, way: int) -> Tensor:
    """Keys [K, n, D] turned by their positions, number by number in the complex plane, or back for -1."""
    out = keys.clone()
    for position in range(keys.shape[1]):
        for pair in range(DIM // 2):
            turn = cmath.exp(1j * way * position * 10_000 ** (-2 * pair / DIM))
            for head in range(len(keys)):
                a, b = keys[head, position, pair], keys[head, position, pair + DIM // 2]
                number = complex(a, b) * turn
                out[head, position, pair], out[head, position, pair + DIM // 2] = number.real, number.imag
    return out


def compressed(chosen: ShadowKV, keys: Tensor, values: Tensor) -> tuple[Packed, Kept]:
    """What attention sees of a cache, and all that is kept of it."""
    length = keys.shape[2]
    kept = chosen.compress(Cached(keys, values), chosen.keeps(length))
    assert kept.keys.shape == kept.values.shape == (LAYERS, HEADS, chosen.keeps(length), DIM)
    return packed_of(chosen, kept, length), kept


def odd_chunks(keys: Tensor, count: int) -> list[int]:
    """Of one head's keys [n, D]: the chunks with the least likeness of a key to their mean."""
    least = []
    for first in range(0, len(keys), CHUNK):
        chunk = keys[first : first + CHUNK].double()
        mean = sum(chunk) / CHUNK
        least.append(min(float(key @ mean / (key.norm() * mean.norm())) for key in chunk))
    return sorted(sorted(range(len(least)), key=lambda number: (least[number], number))[:count])


@given(seed=st.integers(0, 99), rank=st.integers(2, 16), length=st.integers(24, 45))
def test_keys_are_the_nearest_of_the_rank_and_outliers_exact(seed, rank, length):
    keys, values = drawn(seed, length)
    chosen = policy(rank=rank)
    packed, kept = compressed(chosen, keys, values)
    count = (length - RECENT) // CHUNK * CHUNK
    assert packed.tokens == count
    found_keys, found_values = chosen.view.restored(packed)
    assert torch.equal(found_values, values[:, :, :count])
    assert torch.equal(kept.keys[:, :, chosen.view.places(count) :], keys[:, :, count:])
    assert torch.equal(kept.values[:, :, chosen.view.places(count) :], values[:, :, count:])
    for layer in range(LAYERS):
        plain = (turned(keys[layer], -1) if layer == 0 else keys[layer])[:, :count]
        left, sizes, right = torch.linalg.svd(plain.double().transpose(0, 1).flatten(1), full_matrices=False)
        sizes[rank:] = 0
        wanted = ((left * sizes) @ right).view(count, HEADS, DIM).transpose(0, 1).float()
        wanted = turned(wanted, 1) if layer == 0 else wanted
        for head in range(HEADS):
            for chunk in odd_chunks(keys[layer, head, :count], 2):
                own = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
                wanted[head, own] = keys[layer, head, own]
        torch.testing.assert_close(found_keys[layer], wanted, rtol=1e-3, atol=1e-3)


@given(seed=st.integers(0, 99), rank=st.integers(1, 6))
def test_keys_of_the_rank_come_back_exactly(seed, rank):
    keys, values = drawn(seed, 31, rank=rank)
    chosen = policy(rank=max(2, rank), outliers=0)
    found, _ = chosen.view.restored(compressed(chosen, keys, values)[0])
    torch.testing.assert_close(found, keys[:, :, :28], rtol=1e-4, atol=1e-4)


@given(seed=st.integers(0, 99), count=st.integers(1, 7))
def test_a_chunk_is_worth_what_one_query_head_gives_it(seed, count):
    draw = torch.Generator().manual_seed(seed)
    query, landmarks = torch.randn(3, 4, DIM, generator=draw), torch.randn(HEADS, 7, DIM, generator=draw)
    found = best_chunks(query, landmarks, count, 0.5)
    for token in range(3):
        for head in range(HEADS):
            worth = [0.0] * 7
            for each in (2 * head, 2 * head + 1):
                scores = [math.exp(0.5 * float(query[token, each] @ landmark)) for landmark in landmarks[head]]
                worth = [max(old, score / math.fsum(scores)) for old, score in zip(worth, scores, strict=True)]
            order = sorted(range(7), key=lambda number: (-worth[number], number))
            assert found[token, head].tolist() == sorted(order[:count])


def seen_by(chosen: ShadowKV, packed: Packed, query: Tensor, layer: int) -> list[tuple[Tensor, Tensor]]:
    """What each query sees, a query at a time: keys and values [m, K, D]."""
    found = []
    for piece in chosen.view.seen(layer, query, packed, DIM**-0.5):
        for row in range(len(query[piece.rows])):
            own = row if len(piece.keys) > 1 else 0
            found.append((piece.keys[own], piece.values[own]))
    assert len(found) == len(query)
    return found


@given(seed=st.integers(0, 99), outliers=st.integers(0, 7))
def test_full_rank_and_all_chunks_are_dense_attention(seed, outliers):
    keys, values = drawn(seed, 31)
    chosen = policy(rank=1.0, budget=1.0, outliers=outliers)
    packed, _ = compressed(chosen, keys, values)
    query = torch.randn(5, 4, DIM, generator=torch.Generator().manual_seed(seed))
    everything = torch.ones(1, 28, dtype=torch.bool)
    for layer in range(LAYERS):
        rows = (each[layer, :, :28].transpose(0, 1) for each in (keys, values))
        dense = attention(query, *rows, everything.expand(5, -1), scale=DIM**-0.5)
        for row, seen in enumerate(seen_by(chosen, packed, query, layer)):
            found = attention(query[row : row + 1], *seen, everything, scale=DIM**-0.5)
            torch.testing.assert_close(found[0], dense[row], rtol=1e-4, atol=1e-4)


@given(seed=st.integers(0, 99), place=st.integers(0, 39), outliers=st.integers(0, 2))
def test_a_strong_key_is_always_seen(seed, place, outliers):
    """It is in a chunk that is exact, or draws its landmark along."""
    keys, values = drawn(seed, 43)
    query = torch.randn(1, 4, DIM, generator=torch.Generator().manual_seed(seed))
    for layer in range(LAYERS):
        for head in range(HEADS):
            keys[layer, head, place] = 40 * query[0, 2 * head] / query[0, 2 * head].norm()
    chosen = policy(budget=8, rank=1.0, outliers=outliers)
    packed, _ = compressed(chosen, keys, values)
    for layer in range(LAYERS):
        ((_, found),) = seen_by(chosen, packed, query, layer)
        assert len(found) == (2 + outliers) * CHUNK < 40
        for head in range(HEADS):
            assert any(torch.equal(value, values[layer, head, place]) for value in found[:, head])


def test_only_the_values_of_chosen_chunks_are_fetched():
    keys, values = drawn(0, 43)
    chosen = policy(budget=8)
    packed, _ = compressed(chosen, keys, values)
    asked = []

    def fetch(layer: int, wanted: Tensor) -> Tensor:
        asked.append(wanted.shape)
        return packed.fetch(layer, wanted)

    list(chosen.view.seen(0, torch.randn(3, 4, DIM), Packed(packed.tokens, packed.take, fetch), 1.0))
    assert asked == [(3, 8, HEADS)]


@pytest.mark.parametrize(("rank", "chunk", "outliers"), [(5, 4, 2), (16, 8, 0), (1, 2, 30)])
def test_places_are_those_of_the_formula_and_the_host_has_room(rank, chunk, outliers):
    chosen = policy(rank=float(rank) if rank > 1 else 1 / 16, chunk=chunk, outliers=outliers, every=32)
    width = HEADS * DIM
    for length in (RECENT, 20, 64, 97, 400, 1001):
        chunks = (length - RECENT) // chunk
        exact, tokens = min(outliers, chunks), chunks * chunk
        flags, landmarks = HEADS * chunks, (chunks - exact) * width
        numbers = flags + landmarks + 2 * exact * chunk * width + rank * width + rank * tokens if chunks else 0
        places = math.ceil(numbers / (2 * width))
        assert chosen.keeps(length) == places + length - tokens
        for size in (1, 4, 16):
            assert tokens <= chosen.view.aside(size) * math.ceil(places / size)


def engine_of(model: Decoder, kv: ShadowKV, **options: object) -> Engine:
    fields = {"sequences": 4, "block_size": 4, "cache_tokens": 600, "check": True}
    return build_engine(model, EngineConfig.model_validate({"kv": kv, **fields, **options}))


def told(engine: Engine, numbers: range, length: int = 76, count: int = 14) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number in numbers:
        prompt = [(7 * number + place * (3 + number)) % SHAPE.vocabulary for place in range(length)]
        engine.add(Request(str(number), prompt, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)))
    while engine.busy:
        for delta in engine.step():
            found.setdefault(delta.id, []).extend(delta.tokens)
    return found


def test_what_a_sequence_has_on_the_device_is_the_formula_and_the_rest_is_the_pools():
    chosen = ShadowKV(rank=3, chunk=2, outliers=1, recent=2, every=8)
    engine = engine_of(small_model(), chosen)
    engine.add(Request("0", [place % 50 for place in range(61)], SamplingParams(temperature=0, max_tokens=4)))
    seen = set()
    while engine.busy:
        engine.step()
        for held in (each.held for each in engine.memory.running):
            if held is not None and held.dropped:
                # 58 tokens in 29 chunks: flags, 28 landmarks, two keys and values, a basis, and factors; 3 are whole.
                numbers = 2 * 29 + 28 * 16 + 2 * 2 * 16 + 3 * 16 + 3 * 58
                assert held.places == math.ceil(numbers / 32) + 3 + held.computed - 61
                seen.add(len(held.blocks))
                assert engine.memory.pool.blocks - engine.memory.pool.available == len(held.blocks)
    assert seen == {math.ceil((25 + 3 + more) / 4) for more in range(1, 4)}


def test_caches_that_part_have_values_of_their_own():
    """What is on the host is copied with the block that two sequences would write to."""
    model, chosen = small_model(), ShadowKV(rank=3, chunk=2, outliers=1, recent=2, every=5, budget=0.4)
    prompt, sampling = [place % 50 for place in range(40)], SamplingParams(temperature=0.9, n=3, max_tokens=30, seed=3)
    found = []
    for sequences in (1, 4):
        engine, said = engine_of(model, chosen, sequences=sequences), {}
        engine.add(Request("0", prompt, sampling))
        while engine.busy:
            for delta in engine.step():
                said.setdefault(delta.index, []).extend(delta.tokens)
        found.append(said)
    assert found[0] == found[1] and len({tuple(each) for each in found[0].values()}) > 1


@pytest.mark.parametrize(
    "changed",
    [
        {"rope": RopeConfig(fraction=0.5)},
        {"rope": RopeConfig(interleaved=True)},
        {"rope": RopeConfig(scaling=YarnScaling(factor=4, original_context=32))},
        {"unrotated_layers": (0, 1), "learned_positions": True},
        {"unrotated_layers": (0,), "qk_norm": "turned"},
        {"heads": 2},
        {"attention_scale": 0.7},
    ],
)
def test_families_with_other_rotations_say_what_they_say_with_the_full_cache(changed):
    model = Decoder(SHAPE.model_copy(update=changed)).initialize(1).eval()
    engine = engine_of(model, ShadowKV(rank=1, budget=1, chunk=2, outliers=1, recent=2, every=4))
    said = told(engine, range(2))
    assert engine.snapshot().dropped_tokens > 0
    for number in range(2):
        prompt = [(7 * number + place * (3 + number)) % SHAPE.vocabulary for place in range(76)]
        assert said[str(number)] == greedy(model, prompt, 14)


def test_tokens_in_bfloat16_blocks_do_not_depend_on_the_batch():
    chosen = ShadowKV(rank=4, chunk=4, outliers=2, recent=2, every=8, budget=0.3)
    together = told(engine_of(small_model(), chosen, codec="bf16"), range(4))
    assert told(engine_of(small_model(), chosen, codec="bf16"), range(2, 3)) == {"2": together["2"]}


def test_the_hosts_memory_is_counted_where_it_is_the_caches(monkeypatch):
    monkeypatch.setattr(sizing, "free_memory", lambda: 2 * 10**6)
    chosen = ShadowKV(rank=3, chunk=2, outliers=1, recent=2, every=8)
    runner = build_runner(small_model(), EngineConfig(memory=1.0, sequences=8, kv=chosen))
    # A block has 16 places of 32 numbers a layer; a token takes no less than 3 and half a landmark of 16.
    block, aside = 2 * 16 * 32 * 4, 2 * math.ceil(16 * 32 / (3 + 16 / 2)) * 16 * 4
    assert runner.cache.shape.block_bytes == block and runner.cache.shape.aside_bytes == aside
    assert runner.blocks == 10**6 // (block + aside)
    assert runner.memory["aside"] == (runner.blocks + 1) * aside


def test_a_host_without_room_is_told(monkeypatch):
    monkeypatch.setattr(sizing, "free_memory", lambda: 2**30)
    sizing.require_room_aside(2**30)
    with pytest.raises(PenstockError, match=r"2\.0 GiB in the host's memory, of which 1\.0 GiB") as raised:
        sizing.require_room_aside(2**31)
    assert "cache_tokens" in raised.value.hint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv": {"name": "shadow", "rank": 16, "chunk": 1}}, r"saves nothing.*kv.rank"),
        ({"kv": {"name": "shadow", "rank": 1.5}}, "neither a share nor a number"),
        ({"kv": {"name": "shadow", "budget": 2.5}}, "neither a share nor a number"),
        ({"kv": {"name": "shadow", "every": 4}}, "every is 4, and a chunk has 8"),
        ({"kv": "shadow", "codec": "int8"}, r"factors and landmarks.*bf16"),
        ({"kv": "shadow", "attention": "cpu"}, "no view of factors and landmarks beside keys"),
        ({"kv": "shadow", "deterministic": True}, "deterministic does not go together with kv = shadow"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises((UsageError, PenstockError, ValueError), match="(?s)" + message):
        build_engine(small_model(), EngineConfig.model_validate({"cache_tokens": 100, **options}))


def test_a_model_with_windows_is_refused():
    model = Decoder(SHAPE.model_copy(update={"window": 8})).initialize(0).eval()
    with pytest.raises(UsageError, match=r"shadow.*windows"):
        build_engine(model, EngineConfig(kv=ShadowKV(), cache_tokens=100))
