"""The law of ``attention.paged``.

It is checked on every device of this machine, and for every type of numbers, that the policy serves; the answers are
those of plain softmax attention in float64 over each sequence's own tokens, see
:class:`~penstock.testing.paged_scene.Scene`. What each clause is there to catch:

- courses of prompts, chunks, decodes, trees and open tokens: a block or a place that is another sequence's, padding
  that is read, a window that is off by one, a mask, a parent or a scale that is forgotten, parts of the keys that are
  put together with wrong weights, numbers that follow others' in memory in another way than was thought;
- forks, kept paths, evicted tokens and releases among them: a copy, a move or a write that is not of all layers, of
  keys as of values, of each head what is its own, or that reads what it has written; a write to another slot;
- large scores: overflow, or weights that vanish;
- sizes: a memory that is not what it is said to be once its size changes;
- needs: a bound on scores, sinks, chunks or latents that a policy says it knows, and does not compute; of tokens that
  lie in the places of other layers, one that is left out or read for another, by heads or by layers;
- NaN: numbers of one sequence that touch another's, if only by a weight of 0.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from penstock.core.errors import PenstockError
from penstock.core.processor import on_threads
from penstock.core.randomness import torch_generator
from penstock.ops.attention import PLAIN, Extras
from penstock.ops.paged.codecs.contract import Codec, LearnedCodec
from penstock.ops.paged.codecs.plain import Plain
from penstock.ops.paged.contexts import Contexts
from penstock.ops.paged.contract import NEEDS, CacheShape, PagedAttention, PagedBatch, PagedCache
from penstock.serve.kv.reuse.contract import Weighing
from penstock.testing.alike import alike
from penstock.testing.beside_scores import dense
from penstock.testing.paged_pieces import check_spans, shape_in
from penstock.testing.paged_scene import Action, Compact, Fork, Keep, Open, Release, Scene, Step, Tree

PLAIN_CODEC = Plain()

#: Of the error's root mean square, by the type of numbers; their variance is 1.
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}

#: Sizes of heads that are tried. On a GPU a kernel may be compiled for each.
HEAD_DIMS = {"cpu": (2, 16, 20, 32, 64, 80, 128), "cuda": (64, 128)}


class Place(NamedTuple):
    """A device of this machine and a type of numbers, and the sizes of heads that a policy serves there."""

    device: torch.device
    dtype: torch.dtype
    head_dims: tuple[int, ...]


def places(policy: PagedAttention) -> list[Place]:
    """Where the policy works on this machine. On a GPU compiling takes minutes: float16 counts where bfloat16 is not
    served, and float32, whose kernels take the longest, is tried with the smallest heads alone."""
    found: list[Place] = []
    for name in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        device = torch.device(name)
        for dtype in TOLERANCES:
            dims = tuple(dim for dim in HEAD_DIMS[name] if policy.serves(device, dtype, dim) is None)
            if name == "cuda" and dtype == torch.float32:
                dims = dims[:1]
            if dims and not (dtype == torch.float16 and Place(device, torch.bfloat16, dims) in found):
                found.append(Place(device, dtype, dims))
    return found


def check(policy: PagedAttention) -> None:
    """Asserts the law wherever the policy works on this machine.

    Raises:
        PenstockError: it does nowhere.
    """
    served = places(policy)
    if not served:
        reason = policy.serves(torch.device("cpu"), torch.float32, 64)
        raise PenstockError(
            f"{policy.contract_name} {policy.policy_name!r} serves no device of this machine: {reason}",
            hint="Check its law on a machine that it serves.",
        )
    for place in served:
        check_place(policy, place)


def check_place(policy: PagedAttention, place: Place) -> None:
    """Asserts the law in one place. Courses of all kinds, the same each time, are played on CPUs alone: elsewhere
    a kernel may be compiled for every shape."""
    if place.device.type == "cpu":
        _check_courses(policy, place, examples=40)
    check_long_courses(policy, place)
    check_needs(policy, place)
    check_large_scores(policy, place)
    check_nan(policy, place)
    check_sizes(policy, place)


@dataclasses.dataclass(frozen=True)
class Course:
    """A script, and the memory that it is played on; ``seed``, ``windows`` and ``extras`` as in
    :class:`~penstock.testing.paged_scene.Scene`, ``threads`` of the CPU."""

    script: tuple[Action, ...]
    kv_heads: int
    groups: int
    head_dim: int
    block_size: int
    windows: tuple[int | None, ...]
    seed: int = 0
    threads: int = 1
    latent: int | None = None
    extras: Extras = PLAIN
    needs: frozenset[str] = frozenset()

    def shape(self, place: Place) -> CacheShape:
        """That of the memory."""
        gains = [gain for action in self.script if isinstance(action, Step) for gain in action.gains]
        sequences = len(gains) + sum(isinstance(action, Fork) for action in self.script)
        return CacheShape(
            layers=len(self.windows),
            heads=self.groups * self.kv_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            blocks=sum(gain for _, gain in gains) // self.block_size + 2 * sequences,
            block_size=self.block_size,
            dtype=place.dtype,
            device=place.device,
            windows=frozenset(self.windows),
            latent=self.latent,
            needs=self.needs,
        )


#: A tree whose every token is followed by two.
BUSHY = Tree(tuple((token - 1) // 2 for token in range(63)))

#: Prefills, chunks and decodes in one batch; shared blocks; blocks that are dealt out again; masks.
LONG: tuple[Action, ...] = (
    Step(((0, 300), (1, 5), (2, 33))),
    Step(((0, 1), (1, 1), (2, 1))),
    Fork(0, 3),
    Step(((3, 1), (0, 1), (1, 100))),
    Release(2),
    Step(((4, 77), (3, 6), (1, 1))),
    Release(0),
    Step(((5, 1), (3, 1), (4, 1))),
    Step(((5, 500), (3, 1), (1, 3))),
    Step(((3, 1), (4, 40), (1, 7), (5, 63)), ((4, Open(32)), (5, BUSHY))),
    Keep(5, (0, 2, 5, 12)),
    Compact(3, (0, 1, 5, 200, *range(250, 300))),
    Step(((3, 20), (1, 1))),
    Step(((5, 9), (4, 20)), ((5, Tree((-1, -1, 0, 1, 1, -1, 5, 2, 6))),)),
    Step(((5, 1), (3, 1), (4, 2))),
)

#: A long prompt in chunks beside many decodes, of which one forks in the midst of a block.
CROWDED: tuple[Action, ...] = (
    Step((*((number, 20 + 17 * number) for number in range(8)), (100, 400))),
    Step((*((number, 1) for number in range(8)), (100, 1))),
    Fork(1, 9),
    Step(((100, 150), (9, 1), *((number, 1) for number in range(8))), ((100, Open(32)),)),
    Step(((0, 1), (100, 63), (1, 40), (2, 1)), ((100, BUSHY), (1, Open(40)))),
    Keep(100, (0, 2, 5, 12)),
    Step(((100, 1),)),
)


#: Prompts, chunks of them, decodes and masks, few of each.
BRIEF: tuple[Action, ...] = (
    Step(((0, 20), (1, 70))),
    Step(((0, 1), (1, 1))),
    Step(((1, 40), (0, 6)), ((1, Open(8)), (0, Tree((-1, -1, 0, 1, 1, -1))))),
    Keep(0, (0, 2)),
    Step(((0, 1), (1, 3))),
    Compact(1, (0, 3, 4, 50)),
    Step(((0, 1), (1, 3))),
)


def check_long_courses(policy: PagedAttention, place: Place) -> None:
    """Asserts it for long sequences beside many others; on other devices than CPUs, for several shapes of heads."""
    check_course(policy, place, Course(CROWDED, 2, 2, place.head_dims[-1], 16, (None, 100), threads=2))
    if place.device.type == "cpu":
        return
    for windows in ((None,), (50,), (None, 50)):
        for kv_heads, groups in ((4, 1), (2, 4), (1, 7)):
            for head_dim in place.head_dims:
                check_course(policy, place, Course(LONG, kv_heads, groups, head_dim, 16, windows))


def check_course(policy: PagedAttention, place: Place, course: Course, codec: Codec = PLAIN_CODEC) -> None:
    """Asserts that every token sees what it should, on a memory with room for all tokens of the script, and for two
    blocks more for each of its sequences, in a ``codec``. What that learns, it learns of random vectors."""
    shape = with_tables(dataclasses.replace(course.shape(place), codec=codec), course.seed)
    tolerance = TOLERANCES[place.dtype]
    scene = Scene(policy, shape, course.windows, seed=course.seed, tolerance=tolerance, extras=course.extras)
    with on_threads(course.threads):
        scene.play(course.script)


def with_tables(shape: CacheShape, seed: int) -> CacheShape:
    """``shape`` with what its codec learns of random vectors, where it learns."""
    codec = shape.codec
    if not isinstance(codec, LearnedCodec):
        return shape
    draw = torch_generator(seed, "testing/learned")
    size = (shape.layers, shape.parts, 300, shape.kv_heads, shape.head_dim)
    vectors = torch.randn(size, generator=draw).to(shape.device)
    tables = [torch.stack([codec.learn(part) for part in layer]) for layer in vectors]
    return dataclasses.replace(shape, learned=torch.stack(tables))


def check_needs(policy: PagedAttention, place: Place) -> None:
    """Asserts it with all that the policy knows besides, each by itself and all together, where it does not refuse a
    cache with that; of what it does not know it says so. Elsewhere than on CPUs, for long sequences too, and for a
    large latent that is shared by many queries."""
    assert (policy.lacks(frozenset(NEEDS)) is None) == (policy.knows == NEEDS.keys())
    dim = place.head_dims[-1]
    sinks = torch.tensor([-1.0, 0.5, 2.0, 30.0], device=place.device)
    courses = {
        "cap": Course(BRIEF, 2, 2, dim, 16, (None, 30), extras=Extras(cap=0.8)),
        "sinks": Course(BRIEF, 2, 2, dim, 16, (None, 30), threads=2, extras=Extras(sinks=sinks)),
        "chunk": Course(BRIEF, 2, 2, dim, 16, (None,), extras=Extras(chunk=24)),
        "latent": Course(BRIEF, 1, 4, dim, 16, (None,), latent=dim // 2),
    }
    courses = {need: dataclasses.replace(course, needs=frozenset({need})) for need, course in courses.items()}
    everything = dataclasses.replace(
        courses["cap"], needs=frozenset({"cap", "sinks", "chunk"}), extras=Extras(0.8, sinks, 24)
    )
    tried = [*courses.values(), everything]
    if place.device.type != "cpu":
        tried += [
            dataclasses.replace(everything, script=LONG, kv_heads=4, groups=1),
            dataclasses.replace(courses["latent"], script=LONG, groups=100, head_dim=576, latent=512),
        ]
    for course in tried:
        refused = policy.refuses(course.shape(place)) is not None
        assert refused or course.needs <= policy.knows, f"a cache that needs {set(course.needs)} is not refused"
        if not refused:
            check_course(policy, place, course)
    if "contexts" in policy.knows:
        check_contexts(policy, place)
    if "view" in policy.knows:
        for layers in (1, 4):
            check_spans(policy, shape_in(place.dtype, place.device, layers, dim, PLAIN_CODEC), TOLERANCES[place.dtype])


def check_contexts(policy: PagedAttention, place: Place) -> None:
    """Asserts that a text which sees contexts has the attention of one softmax over all of them, in a chunk before and
    behind which there is more, and that a text beside it has its own."""
    dim, tolerance, draw = place.head_dims[-1], TOLERANCES[place.dtype], torch.Generator().manual_seed(0)
    needs, size, after = frozenset({"contexts"}), 4, 5
    cache = policy.open(CacheShape(1, 4, 2, dim, 20, size, place.dtype, place.device, needs=needs))
    query, key, value = (torch.randn(30, heads, dim, generator=draw).to(place.dtype) for heads in (4, 2, 2))
    # The first text has 10 tokens, in the blocks 3 and on; another has 7; and the contexts have 13, in other blocks.
    own, other, beside = slice(0, 10), slice(10, 17), slice(17, 30)
    places = torch.cat([torch.arange(10) + 12, torch.arange(7) + 28, torch.arange(13).flip(0) + 44])
    tables = torch.tensor([[3, 4, 5], [7, 8, 0]], dtype=torch.int32)

    def attended(rows: slice, lengths: list[int], starts: list[int], blocks: Tensor, *contexts: Contexts) -> Tensor:
        first, count = (torch.tensor(each, dtype=torch.int32) for each in (starts, lengths))
        cache.plan(PagedBatch(first, count, blocks, places[rows], contexts=contexts))
        given = (x[rows].to(place.device) for x in (query, key, value))
        return cache.attend(0, *given, scale=0.4, window=None).cpu()

    attended(beside, [13], [0, 13], torch.tensor([[11, 12, 13, 14]], dtype=torch.int32))
    attended(slice(0, 4), [4], [0, 4], tables[:1])
    seen = Contexts(0, after, places[beside], temperature=0.6, scale=1.3)
    found = attended(slice(4, 17), [10, 7], [0, 6, 13], tables, seen)
    pairs = [(key[rows], value[rows]) for rows in (own, beside, other)]
    wanted = [
        dense(query[own], pairs[0], pairs[1], after, Weighing(0.6, 1.3), 0.4)[4:],
        dense(query[other], pairs[2], pairs[1], 7, Weighing(1, 1), 0.4),
    ]
    error = (found.double() - torch.cat(wanted)).square().mean().sqrt()
    assert error < tolerance, f"attention to contexts is wrong by {error:.1e}"


def check_large_scores(policy: PagedAttention, place: Place) -> None:
    """Asserts that with scores of thousands all weight is on the nearest keys, and nothing is NaN."""
    dim, rounding = place.head_dims[-1], TOLERANCES[place.dtype]
    cache = policy.open(CacheShape(1, 1, 1, dim, 4, 16, place.dtype, place.device))
    query, key = torch.full((40, 1, dim), 100.0), torch.zeros(40, 1, dim)
    key[7], key[30] = 10.0, -10.0
    value = torch.arange(40.0).reshape(40, 1, 1).expand(40, 1, dim)
    out = _prefill(cache, [40], query, key, value, scale=16 / dim)[:, 0]
    wanted = torch.tensor([p / 2 if p < 7 else 7.0 for p in range(40)]).unsqueeze(1).expand(40, dim)
    torch.testing.assert_close(out.float(), wanted, rtol=rounding, atol=rounding)


def check_nan(policy: PagedAttention, place: Place) -> None:
    """Asserts that a sequence that went wrong says so in its output, and in no other's."""
    dim = place.head_dims[-1]
    cache = policy.open(CacheShape(1, 2, 1, dim, 4, 16, place.dtype, place.device))
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(40, heads, dim, generator=draw) for heads in (2, 1, 1))
    clean = _prefill(cache, [20, 20], query, key, value)
    key[21] = math.nan
    dirty = _prefill(cache, [20, 20], query, key, value)
    assert torch.equal(dirty[:20], clean[:20]), "one sequence's NaN changes another's output"
    assert dirty[21:].isnan().all(), "a NaN among a sequence's keys does not show in its output"


def check_sizes(policy: PagedAttention, place: Place) -> None:
    """Asserts that a memory whose size was changed, to more blocks or fewer, answers as one that was made so."""
    dim, draw = place.head_dims[-1], torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(70, heads, dim, generator=draw) for heads in (2, 1, 1))

    def opened(blocks: int) -> PagedCache:
        return policy.open(CacheShape(1, 2, 1, dim, blocks, 16, place.dtype, place.device))

    cache = opened(2)
    for blocks, lengths in ((6, [50, 20]), (3, [30])):
        cache.resize(blocks)
        assert cache.shape.blocks == blocks
        count = sum(lengths)
        found, wanted = (
            _prefill(each, lengths, query[:count], key[:count], value[:count]) for each in (cache, opened(blocks))
        )
        assert torch.equal(found, wanted), f"a memory of {blocks} blocks is not what one made with as many is"


def _prefill(
    cache: PagedCache, lengths: list[int], query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0
) -> Tensor:
    """Whole sequences in one step, in consecutive blocks."""
    size = cache.shape.block_size
    widths = [-(-length // size) for length in lengths]
    firsts = [sum(widths[:b]) for b in range(len(widths))]
    tables = torch.tensor([[first + i for i in range(max(widths))] for first in firsts], dtype=torch.int32)
    slots = torch.cat([torch.arange(length) + first * size for first, length in zip(firsts, lengths, strict=True)])
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    cache.plan(PagedBatch(starts, torch.tensor(lengths, dtype=torch.int32), tables, slots))
    query, key, value = (x.to(cache.shape.device, cache.shape.dtype) for x in (query, key, value))
    return cache.attend(0, query, key, value, scale=scale, window=None).cpu()


def _check_courses(policy: PagedAttention, place: Place, examples: int) -> None:
    @alike(examples)
    @given(course=courses(place.head_dims))
    def play(course: Course) -> None:
        check_course(policy, place, course)

    play()


def courses(head_dims: tuple[int, ...]) -> st.SearchStrategy[Course]:
    """Courses of all kinds, on small memories with heads of one of these sizes."""
    return st.builds(
        Course,
        script=_scripts(),
        kv_heads=st.integers(1, 3),
        groups=st.sampled_from([1, 2, 3, 4, 7]),
        head_dim=st.sampled_from(head_dims),
        block_size=st.sampled_from([1, 2, 5, 8, 16, 24, 32]),
        windows=st.lists(st.one_of(st.none(), st.integers(1, 90)), min_size=1, max_size=3).map(tuple),
        seed=st.integers(0, 2**32),
        threads=st.integers(1, 3),
    )


@st.composite
def _scripts(draw: st.DrawFn) -> tuple[Action, ...]:
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
            masks = {n: draw(_masks_over(gain)) for n, gain in gains.items() if draw(st.booleans())}
            script.append(Step(tuple(gains.items()), tuple(masks.items())))
            live += [n for n in gains if n not in live]
            for n, mask in masks.items():
                if isinstance(mask, Tree) and draw(st.booleans()):
                    path: list[int] = []
                    token = draw(st.integers(0, gains[n] - 1))
                    while token >= 0:
                        path, token = [token, *path], mask.parents[token]
                    script.append(Keep(n, tuple(path)))
    return tuple(script)


@st.composite
def _masks_over(draw: st.DrawFn, count: int) -> Tree | Open:
    """A mask over so many new tokens: they branch now and then, or at random, or some are open."""
    if draw(st.booleans()):
        return Open(draw(st.integers(0, count)))
    parents = list(range(-1, count - 1))
    for token in draw(st.lists(st.integers(0, count - 1), max_size=5)):
        parents[token] = draw(st.integers(-1, token - 1))
    return Tree(tuple(parents))
