"""The law of ``attention.paged``, for every registered policy that serves the CPU."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from penstock.ops.paged.contract import CacheShape, PagedAttention, PagedBatch, PagedCache
from penstock.ops.paged.reference import Reference, ReferenceCache
from penstock.testing.attention_paged import Action, Fork, Keep, Open, Release, Scene, Step, Tree
from penstock.testing.enrolled import enrolled

CPU = torch.device("cpu")
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3}
POLICIES = enrolled("attention.paged")


def serving(name: str, dtype: torch.dtype) -> PagedAttention:
    """The policy, where it works for ``dtype`` on this machine's CPU."""
    policy = POLICIES[name]
    assert isinstance(policy, PagedAttention)
    reason = policy.serves(CPU, dtype, 16)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return policy


def scene(
    policy: PagedAttention,
    *,
    kv_heads: int,
    groups: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    windows: tuple[int | None, ...],
    script: tuple[Action, ...],
    seed: int = 0,
) -> Scene:
    """A scene with room for all tokens of a script, and for two blocks more for each of its sequences."""
    gains = [gain for action in script if isinstance(action, Step) for gain in action.gains]
    sequences = len(gains) + sum(isinstance(action, Fork) for action in script)
    blocks = sum(gain for _, gain in gains) // block_size + 2 * sequences
    shape = CacheShape(
        len(windows), groups * kv_heads, kv_heads, head_dim, blocks, block_size, dtype, CPU, frozenset(windows)
    )
    return Scene(policy, shape, windows, seed=seed, tolerance=TOLERANCES[dtype])


def prefill(cache: PagedCache, lengths: list[int], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Whole sequences in one step, in consecutive blocks."""
    size = cache.shape.block_size
    widths = [-(-length // size) for length in lengths]
    firsts = [sum(widths[:b]) for b in range(len(widths))]
    tables = torch.tensor([[first + i for i in range(max(widths))] for first in firsts], dtype=torch.int32)
    slots = torch.cat([torch.arange(length) + first * size for first, length in zip(firsts, lengths, strict=True)])
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    cache.plan(PagedBatch(starts, torch.tensor(lengths, dtype=torch.int32), tables, slots))
    return cache.attend(0, query, key, value, scale=1.0, window=None)


@st.composite
def scripts(draw: st.DrawFn) -> tuple[Action, ...]:
    """What six sequences go through: prefills, chunks, decodes, forks and releases, in any order."""
    live: list[int] = []
    script: list[Action] = []
    for number in range(draw(st.integers(1, 7))):
        kind = draw(st.sampled_from(["step", "step", "step", "fork", "release"])) if live else "step"
        if kind == "release":
            script.append(Release(live.pop(draw(st.integers(0, len(live) - 1)))))
        elif kind == "fork":
            script.append(Fork(draw(st.sampled_from(live)), 10 + number))
            live.append(10 + number)
        else:
            chosen = draw(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True))
            chosen += draw(st.lists(st.sampled_from(live), max_size=3, unique=True)) if live else []
            gains = {n: draw(st.one_of(st.just(1), st.integers(1, 5), st.integers(1, 70))) for n in chosen}
            masks = {n: draw(masks_over(gain)) for n, gain in gains.items() if draw(st.booleans())}
            script.append(Step(tuple(gains.items()), tuple(masks.items())))
            live += [n for n in gains if n not in live]
            for n, mask in masks.items():
                if isinstance(mask, Tree) and draw(st.booleans()):
                    path, token = [], draw(st.integers(0, gains[n] - 1))
                    while token >= 0:
                        path, token = [token, *path], mask.parents[token]
                    script.append(Keep(n, tuple(path)))
    return tuple(script)


@st.composite
def masks_over(draw: st.DrawFn, count: int) -> Tree | Open:
    """A mask over so many new tokens: they branch now and then, or at random, or some are open."""
    if draw(st.booleans()):
        return Open(draw(st.integers(0, count)))
    parents = list(range(-1, count - 1))
    for token in draw(st.lists(st.integers(0, count - 1), max_size=5)):
        parents[token] = draw(st.integers(-1, token - 1))
    return Tree(tuple(parents))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=25)
@given(
    script=scripts(),
    kv_heads=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 3, 4, 7]),
    head_dim=st.sampled_from([2, 16, 20, 32, 64, 80, 128]),
    block_size=st.sampled_from([1, 2, 5, 8, 16, 24, 32]),
    windows=st.lists(st.one_of(st.none(), st.integers(1, 90)), min_size=1, max_size=3).map(tuple),
    seed=st.integers(0, 2**32),
    threads=st.integers(1, 3),
)
def test_equals_softmax_attention_over_each_sequences_own_tokens(
    name, dtype, script, kv_heads, groups, head_dim, block_size, windows, seed, threads
):
    policy = serving(name, dtype)
    shape = {"kv_heads": kv_heads, "groups": groups, "head_dim": head_dim, "block_size": block_size}
    torch.set_num_threads(threads)
    try:
        scene(policy, **shape, dtype=dtype, windows=windows, script=script, seed=seed).play(script)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("window", [None, 100])
def test_a_long_prompt_in_chunks_beside_many_decodes(name: str, window: int | None):
    policy = serving(name, torch.float32)
    bushy = Tree(tuple((token - 1) // 2 for token in range(63)))
    script = (
        Step((*((number, 20 + 17 * number) for number in range(8)), (100, 700))),
        Step((*((number, 1) for number in range(8)), (100, 1))),
        Step(((100, 300), *((number, 1) for number in range(8))), ((100, Open(32)),)),
        Step(((0, 1), (100, 63), (1, 40), (2, 1)), ((100, bushy), (1, Open(40)))),
        Keep(100, (0, 2, 5, 12)),
        Step(((100, 1),)),
    )
    shape = {"kv_heads": 2, "groups": 2, "head_dim": 64, "block_size": 16, "dtype": torch.float32}
    torch.set_num_threads(2)
    try:
        scene(policy, **shape, windows=(window,), script=script).play(script)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("name", POLICIES)
def test_extreme_scores_neither_overflow_nor_vanish(name: str):
    """Scores of thousands: all weight on the nearest keys, and no NaN."""
    policy = serving(name, torch.float32)
    cache = policy.open(CacheShape(1, 1, 1, 16, 4, 16, torch.float32, CPU))
    query = torch.full((40, 1, 16), 100.0)
    key = torch.zeros(40, 1, 16)
    key[7], key[30] = 10.0, -10.0
    value = torch.arange(40.0).reshape(40, 1, 1).expand(40, 1, 16)
    out = prefill(cache, [40], query, key, value)[:, 0]
    wanted = torch.tensor([p / 2 if p < 7 else 7.0 for p in range(40)]).unsqueeze(1).expand(40, 16)
    torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", POLICIES)
def test_a_tokens_nan_stays_with_its_own_sequence(name: str):
    """A sequence that went wrong says so in its output, and in no other's."""
    policy = serving(name, torch.float32)
    cache = policy.open(CacheShape(1, 2, 1, 8, 6, 4, torch.float32, CPU))
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(12, heads, 8, generator=draw) for heads in (2, 1, 1))
    clean = prefill(cache, [6, 6], query, key, value)
    key[7] = math.nan
    dirty = prefill(cache, [6, 6], query, key, value)
    assert torch.equal(dirty[:6], clean[:6])
    assert dirty[7:].isnan().all()


def test_the_suite_notices_a_mask_that_is_not_heeded():
    """The suite itself: a memory that takes every batch for causal does not pass, with a tree or with open tokens."""

    class Causal(Reference):
        def open(self, shape):
            cache = ReferenceCache(shape)
            plan = cache.plan
            cache.plan = lambda batch, lane=0: plan(dataclasses.replace(batch, parents=None, open=None), lane)
            return cache

    shape = {"kv_heads": 1, "groups": 1, "head_dim": 8, "block_size": 4, "dtype": torch.float64}
    for mask in (Tree((-1, 0, 0)), Open(2)):
        script = (Step(((0, 10),)), Step(((0, 3),), ((0, mask),)))
        with pytest.raises(AssertionError, match="an error of"):
            scene(Causal(), **shape, windows=(None,), script=script).play(script)


def test_the_suite_notices_a_token_that_moved_too_late():
    """The suite itself: a memory that moves tokens one after the other, and so loses some, does not pass."""

    class Hasty(ReferenceCache):
        def move(self, sources, targets):
            for source, target in zip(reversed(sources), reversed(targets), strict=True):
                super().move([source], [target])

    class Moving(Reference):
        def open(self, shape):
            return Hasty(shape)

    shape = {"kv_heads": 1, "groups": 1, "head_dim": 8, "block_size": 4, "dtype": torch.float64}
    script = (Step(((0, 10),)), Step(((0, 4),), ((0, Tree((-1, -1, 1, 2))),)), Keep(0, (1, 2, 3)))
    with pytest.raises(AssertionError, match="an error of"):
        scene(Moving(), **shape, windows=(None,), script=script).play(script)


def test_the_suite_notices_a_stray_write():
    """The suite itself: a memory that writes one slot too many does not pass."""

    class StrayCache(ReferenceCache):
        def attend(self, layer, query, key, value, **options):
            out = super().attend(layer, query, key, value, **options)
            self._memory[layer, 0].flatten(0, 1)[int(self._batch.slots[0]) - 1] = 0
            return out

    class Stray(Reference):
        def open(self, shape):
            return StrayCache(shape)

    shape = {"kv_heads": 1, "groups": 1, "head_dim": 8, "block_size": 4, "dtype": torch.float64}
    script = (Step(((0, 10), (1, 10))), Step(((0, 1), (1, 1))))
    with pytest.raises(AssertionError, match="an error of"):
        scene(Stray(), **shape, windows=(None,), script=script).play(script)
