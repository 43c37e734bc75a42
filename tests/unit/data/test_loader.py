from __future__ import annotations

import threading
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import DataError
from penstock.data.loader import Batch, Loader
from penstock.data.samplers.sequential import Sequential
from penstock.data.samplers.shuffle import Shuffle
from penstock.data.store import TokenStore
from penstock.models.attention import PackedRows
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder

IGNORE = -100


class Documents:
    """Documents of the given lengths as a token stream, in which the token at position p is p."""

    def __init__(self, lengths: list[int]) -> None:
        self.owners = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        self.tokens = len(self.owners)
        self.starts = set(np.cumsum([0, *lengths[:-1]]).tolist())

    def read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(start, start + count, dtype=np.int32), self.owners[start : start + count]


LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=30)


def tensors(batch: Batch) -> tuple[torch.Tensor, ...]:
    return batch.tokens, batch.targets, batch.documents


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def joined(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat(parts) for parts in zip(*map(tensors, batches), strict=True)))


@given(lengths=LENGTHS, length=st.integers(1, 40))
def test_packing_against_brute_force(lengths, length):
    stream = Documents(lengths)
    if stream.tokens <= length:
        with pytest.raises(DataError, match="too few for a row"):
            Loader(stream, length=length, sampler=Sequential(), seed=0)
        return
    loader = Loader(stream, length=length, sampler=Sequential(), seed=0)
    assert loader.samples == len(range(0, stream.tokens - length, length))
    batch = loader.batch(0, loader.samples)
    assert {tensor.dtype for tensor in tensors(batch)} == {torch.int64}
    for row in range(loader.samples):
        for column in range(length):
            position = row * length + column
            end_of_document = position + 1 in stream.starts
            assert batch.tokens[row, column] == position
            assert batch.documents[row, column] == stream.owners[position]
            assert batch.targets[row, column] == (IGNORE if end_of_document else position + 1)


@given(lengths=LENGTHS, length=st.integers(1, 10), seed=st.integers(0, 10), epoch=st.integers(0, 3))
def test_every_token_is_predicted_once_an_epoch(lengths, length, seed, epoch):
    """All but each document's first, which nothing precedes, and the ragged end."""
    stream = Documents([*lengths, length + 1])
    loader = Loader(stream, length=length, sampler=Shuffle(), seed=seed)
    size = loader.samples
    batches = [loader.batch(position, 1) for position in range(epoch * size, (epoch + 1) * size)]
    predicted = Counter(token for batch in batches for token in batch.targets.flatten().tolist() if token != IGNORE)
    assert predicted == Counter(set(range(1, size * length + 1)) - stream.starts)


@pytest.fixture(scope="module")
def stream() -> Documents:
    return Documents(np.random.default_rng(0).integers(1, 60, 200).tolist())


@pytest.mark.parametrize("sampler", [Shuffle(), Sequential()])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
def test_ranks_share_the_global_batch(stream, sampler, world):
    whole = Loader(stream, length=16, sampler=sampler, seed=4)
    ranks = [Loader(stream, length=16, sampler=sampler, seed=4, rank=r, world=world) for r in range(world)]
    for start in (0, 24, whole.samples - 5):
        parts = [rank.batch(start, 12) for rank in ranks]
        assert {part.tokens.shape for part in parts} == {(12 // world, 16)}
        assert same(joined(parts), whole.batch(start, 12))


@given(worlds=st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=6), steps=st.integers(1, 4))
def test_resumes_exactly_on_any_number_of_ranks(worlds, steps):
    """A run that restarts every few steps with another number of ranks sees what an unbroken one sees."""
    stream = Documents([7, 50, 13, 90, 1, 1, 30] * 3)
    rows, position, seen = 12, 0, []
    for world in worlds:
        ranks = [Loader(stream, length=8, sampler=Shuffle(), seed=1, rank=r, world=world) for r in range(world)]
        iterators = [rank.prefetch(position, rows, steps=steps) for rank in ranks]
        for parts in zip(*iterators, strict=True):
            seen.append(joined(list(parts)))
            position += rows
    unbroken = Loader(stream, length=8, sampler=Shuffle(), seed=1)
    straight = [unbroken.batch(start, rows) for start in range(0, position, rows)]
    assert len(seen) == len(straight) == steps * len(worlds)
    assert all(same(a, b) for a, b in zip(seen, straight, strict=True))


def test_seeds_and_epochs_bring_other_orders(stream):
    def order(seed: int, epoch: int) -> list[int]:
        loader = Loader(stream, length=16, sampler=Shuffle(), seed=seed)
        return loader.batch(epoch * loader.samples, loader.samples).tokens[:, 0].tolist()

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(o) for o in orders}) == 6
    assert len({tuple(sorted(o)) for o in orders}) == 1


def test_prefetch_gives_the_batches_in_turn(stream):
    loader = Loader(stream, length=16, sampler=Shuffle(), seed=0)
    endless = loader.prefetch(6, 4)
    for start in range(6, 6 + 40, 4):
        assert same(next(endless), loader.batch(start, 4))
    endless.close()
    assert len(list(loader.prefetch(0, 4, steps=7, depth=3))) == 7
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("penstock-ahead")]


def test_prefetch_raises_what_reading_raises(stream):
    class Failing(Documents):
        def read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
            if start >= 32:
                raise OSError("the disk is gone")
            return super().read(start, count)

    batches = Loader(Failing([1000]), length=16, sampler=Sequential(), seed=0).prefetch(0, 1)
    assert next(batches).tokens[0, 0] == 0
    assert next(batches).tokens[0, 0] == 16
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_bad_requests_are_refused(stream):
    with pytest.raises(ValueError, match=r"rank 2 is not in \[0, 2\)"):
        Loader(stream, length=8, sampler=Shuffle(), seed=0, rank=2, world=2)
    with pytest.raises(ValueError, match="rows of 0 tokens"):
        Loader(stream, length=0, sampler=Shuffle(), seed=0)
    loader = Loader(stream, length=8, sampler=Shuffle(), seed=0, rank=1, world=3)
    for rows in (0, 4, 2):
        with pytest.raises(ValueError, match="cannot be shared by 3 ranks"):
            loader.batch(0, rows)


class Simulated:
    """A stream of ``tokens`` that takes no memory: token p is p modulo 50,000, documents have 1,000 tokens."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        position = np.arange(start, start + count)
        return (position % 50_000).astype(np.int32), (position // 1000).astype(np.int32)


def test_a_thousand_million_samples_take_no_memory():
    loader = Loader(Simulated(512 * 10**9 + 1), length=512, sampler=Shuffle(), seed=0)
    assert loader.samples == 10**9
    loader.batch(0, 32)
    tracemalloc.start()
    for start in range(0, 2 * 10**9, 10**8):
        batch = loader.batch(start, 32)
        assert batch.tokens.shape == (32, 512)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6


def test_to_another_device_keeps_the_values(stream):
    batch = Loader(stream, length=16, sampler=Shuffle(), seed=0).batch(0, 4)
    moved = batch.to("meta")
    assert {tensor.device.type for tensor in tensors(moved)} == {"meta"}
    assert same(batch.to("cpu"), batch)


def test_no_token_sees_another_document(listed, tokenizer, tmp_path):
    """In batches of a real store: other tokens in one document leave all hidden states outside it bit-equal."""
    texts = [f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 4) for i in range(40)]
    store = TokenStore.build(listed.of(*texts), tokenizer, tmp_path / "store", held_out=0)
    batch = Loader(store.split("train"), length=64, sampler=Shuffle(), seed=0).batch(0, 8)
    shape = DecoderConfig(vocabulary=400, hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=64, context=64)
    model = Decoder(shape).initialize(0)
    context = PackedRows.of(batch.documents)
    with torch.no_grad():
        hidden = model(batch.tokens, context).hidden
        for document in batch.documents.unique()[::3]:
            inside = batch.documents == document
            changed = model(torch.where(inside, 400 - 1 - batch.tokens, batch.tokens), context).hidden
            assert torch.equal(changed[~inside], hidden[~inside])
            assert not torch.equal(changed[inside], hidden[inside])
    assert len(batch.documents.unique()) > 8
