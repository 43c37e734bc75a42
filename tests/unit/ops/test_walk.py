"""The kernels in which each query walks its keys, beside attention by its definition in float64; also without a GPU, by
Triton's interpreter (``TRITON_INTERPRET=1``)."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from interpreted import DEVICE, repaired, runs
from penstock.ops.attention import PLAIN, Extras
from penstock.ops.paged.contract import CacheShape, PagedBatch, PagedCache, StepShape
from penstock.ops.paged.reference import Reference
from penstock.testing.attention_paged import Course, Place, check_course
from penstock.testing.paged_scene import Open, Step, Tree, attention, sees

walk = pytest.importorskip("penstock.ops.paged.walk")
from penstock.ops.paged.invariant import Invariant, WalkedCache  # noqa: E402

pytestmark = runs
__all__ = ["repaired"]

SINKS = torch.tensor([-1.0, 0.5, 2.0, 12.0])
LATENT = {"kv_heads": 1, "head_dim": 18, "latent": 14}
#: What attention does besides, the window, and what the shape has for it.
KINDS = {
    "plain": (PLAIN, 50, {}),
    "cap": (Extras(cap=1.5), None, {}),
    "cap and window": (Extras(cap=0.8), 30, {}),
    "sinks": (Extras(sinks=SINKS), None, {}),
    "sinks and window": (Extras(sinks=SINKS), 20, {}),
    "chunk": (Extras(chunk=24), None, {}),
    "everything": (Extras(0.8, SINKS, 40), 30, {}),
    "latent": (PLAIN, None, LATENT),
    "latent and everything": (Extras(0.8, SINKS, 40), 30, LATENT),
}


class Walked(Invariant):
    """It opens the kernels' cache on any device."""

    def open(self, shape: CacheShape) -> PagedCache:
        return WalkedCache(shape)


def shape_of(**given: object) -> CacheShape:
    usual = CacheShape(1, 4, 2, 20, 60, 16, torch.float32, torch.device(DEVICE))
    return dataclasses.replace(usual, **given)


class Text:
    """Random queries, keys and values of a sequence of ``length`` tokens, in its own blocks of a cache in any order."""

    def __init__(self, shape: CacheShape, length: int, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.shape = shape
        self.query, self.key, self.value = (
            torch.randn(length, heads, shape.head_dim, generator=draw, dtype=torch.float64).to(shape.dtype)
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
        )
        if shape.latent is not None:
            self.value = self.key[..., : shape.latent]
        self.table = torch.randperm(-(-length // shape.block_size), generator=draw).int()

    def slots(self, first: int, last: int) -> torch.Tensor:
        place, size = torch.arange(first, last), self.shape.block_size
        return self.table[place // size].long() * size + place % size


def attended(
    cache: PagedCache,
    text: Text,
    first: int,
    last: int,
    window: int | None,
    extras: Extras,
    step: StepShape | None = None,
    parents: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the tokens [first, last) of the text see."""
    starts, lengths = torch.tensor([0, last - first], dtype=torch.int32), torch.tensor([last], dtype=torch.int32)
    cache.plan(PagedBatch(starts, lengths, text.table[None], text.slots(first, last), parents=parents, shape=step))
    extras = extras._replace(sinks=None if extras.sinks is None else extras.sinks.to(DEVICE))
    given = (each[first:last].to(DEVICE) for each in (text.query, text.key, text.value))
    return cache.attend(0, *given, scale=0.3, window=window, extras=extras).cpu()


@pytest.mark.parametrize("kind", KINDS)
def test_courses_of_prompts_decodes_and_masks_in_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged batches of sequences of several pieces, with trees, open tokens, and two layers."""
    monkeypatch.setattr(walk, "PIECE", 64)
    extras, window, given = KINDS[kind]
    tree = Tree((-1, -1, 0, 1, 1, -1))
    script = (
        Step(((0, 20), (1, 130))),
        Step(((0, 1), (1, 1))),
        Step(((1, 40), (0, 6)), ((1, Open(8)), (0, tree))),
        Step(((0, 3), (1, 1), (2, 9))),
    )
    place = Place(torch.device(DEVICE), torch.float32, (20,))
    extras = extras._replace(sinks=None if extras.sinks is None else extras.sinks.to(DEVICE))
    course = Course(script, 2, 2, 20, 16, (window, None), extras=extras)
    if given:
        course = dataclasses.replace(course, kv_heads=1, groups=4, head_dim=18, latent=14)
    check_course(Walked(), place, course)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_has_the_readable_backends_attention(kind: str, dtype: torch.dtype) -> None:
    extras, window, given = KINDS[kind]
    text = Text(shape_of(dtype=dtype, **given), 75)
    found, wanted = (attended(each.open(text.shape), text, 0, 75, window, extras) for each in (Walked(), Reference()))
    torch.testing.assert_close(found, wanted, rtol=0, atol={torch.float32: 2e-6}.get(dtype, 0.02))


@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_the_same_in_a_prompt_in_chunks_in_pieces_and_when_decoded(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces that are items of work by themselves, and those that one item walks, are merged by the same arithmetic; a
    sink joins once."""
    if DEVICE == "cpu":  # where a product's sums are in another order in another row
        monkeypatch.setattr(np, "matmul", lambda a, b, **_: np.einsum("ij,jk->ik", a, b))
    monkeypatch.setattr(walk, "PIECE", 64)
    extras, window, given = KINDS[kind]
    text, found = Text(shape_of(**given), 200), []
    for enough in (1, 512):
        monkeypatch.setattr(walk, "ENOUGH", enough)
        for cuts in ((0, 200), (0, 100, 131, 199, 200)):
            cache = Walked().open(text.shape)
            found.append(torch.cat([attended(cache, text, *pair, window, extras) for pair in itertools.pairwise(cuts)]))
    assert all(torch.equal(each, found[0]) for each in found[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_plans_of_fixed_shapes_attend_as_others_do(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "PIECE", 64)
    extras, window, given = KINDS[kind]
    text = Text(shape_of(**given), 200)
    shapes = [StepShape(1), StepShape(0, 1, 9, 9)]
    fixed, free = (Walked().open(text.shape) for _ in range(2))
    assert fixed.fix(shapes, 20)
    parents = torch.tensor([-1, 0, 0, 2, 3, 3, 1, 6, 7], dtype=torch.int32)
    steps = [(0, 190, None, None), (190, 191, shapes[0], None), (191, 200, shapes[1], parents)]
    for first, last, step, tree in steps:
        found = attended(fixed, text, first, last, window, extras, step, tree)
        assert torch.equal(found, attended(free, text, first, last, window, extras, None, tree))


@pytest.mark.parametrize(("heads", "latent", "rest"), [(71, 14, 4), (19, 512, 64)])
def test_many_queries_share_a_latent(heads: int, latent: int, rest: int) -> None:
    """More than a tile has rows, cut into shares of which the last is smaller; and a latent so large that tiles are
    small."""
    shape = shape_of(heads=heads, kv_heads=1, head_dim=latent + rest, latent=latent)
    text, sinks = Text(shape, 40), torch.linspace(-2, 2, heads)
    cache = Walked().open(shape)
    found = [attended(cache, text, *pair, None, Extras(sinks=sinks)) for pair in ((0, 33), (33, 40))]
    given = (each.double() for each in (text.query, text.key, text.value))
    wanted = attention(*given, sees(40, 40, None, None), scale=0.3, extras=Extras(sinks=sinks))
    torch.testing.assert_close(torch.cat(found).double(), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("cap", [0.5, 5.0, 30.0, 1000.0])
def test_bent_scores_are_precise_from_the_smallest_to_the_largest(cap: float) -> None:
    """A token sees two keys: what these weigh says what the score of one is beside the other's, which is 0."""
    shape = shape_of(heads=1, kv_heads=1, head_dim=16, block_size=16)
    text = Text(shape, 2)
    scores = torch.logspace(-4, 4, 41, dtype=torch.float64)
    for score in (*scores, *-scores):
        bent = cap * torch.tanh(score / cap)
        if abs(bent) < 8:
            for each in (text.query, text.key, text.value):
                each.zero_()
            text.query[1, 0, 0], text.key[1, 0, 0], text.value[1, 0, 0] = 1.0, float(score) / 0.3, 1.0
            weight = attended(Walked().open(shape), text, 0, 2, None, Extras(cap=cap))[1, 0, 0].double()
            rounding = 3e-7 / (1 - weight) + 2e-6 * abs(bent)
            assert abs(torch.logit(weight) - bent) < rounding
