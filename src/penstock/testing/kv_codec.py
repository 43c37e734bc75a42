"""The law of ``kv.codec``.

What each clause is there to catch:

- round trips: a scale of another vector, group or head, codes that overflow or are cut off, halves of a byte in the
  wrong order, a largest number that has no code, vectors of nothing but zeros;
- the same code in any company: a scale that is shared by tokens, so that who came together would matter;
- NaN: a sequence that went wrong and does not say so, or says so in another's place;
- bytes: a memory that is larger than what it is said to be;
- attention: codes that a kernel reads in another way than the definition, a step that is forgotten, copies and moves
  that leave a part of the code behind; of windows in full precision, a place that is read from the wrong side of an
  edge, from both or from neither, and a prompt that does not fit into its ring;
- tokens: codes that depend on the block, the chunk or the batch; a table of another layer, or of values for keys. The
  engine computes in float64 here, where no code is within rounding of another;
- windows in full precision: what is read of them depends on chunks, drafts, forks, shared prefixes or preemption;
  tokens that are read from another sequence's window, or from one that was overwritten; more of them than there are, or
  fewer; memory that nobody counts;
- compressed caches: what is kept is coded by another table, or not at all; windows that go on where a cache was
  compressed.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import defaultdict
from typing import Any, cast

import torch
from hypothesis import given
from hypothesis.stateful import run_state_machine_as_test
from torch import Tensor

from penstock.core.randomness import torch_generator
from penstock.models.attention import CausalRows
from penstock.models.decoder import Decoder
from penstock.ops.attention import PLAIN, Extras, attend_rows, causal_mask
from penstock.ops.paged.codecs.contract import Codec, LearnedCodec
from penstock.ops.paged.contract import CacheShape, PagedAttention
from penstock.serve.batching.sarathi import Sarathi
from penstock.serve.build import build_engine, build_runner
from penstock.serve.calibration import learned_tables
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.engine.loops.plain import Plain
from penstock.serve.kv.policies.contract import CachePolicy
from penstock.serve.kv.policies.h2o import HeavyHitters
from penstock.serve.kv.policies.pyramidkv import PyramidKV
from penstock.serve.messages import Request
from penstock.speculate.contract import Drafter
from penstock.speculate.controllers.fixed import Fixed
from penstock.speculate.drafters.ngram import Ngram
from penstock.testing.alike import alike
from penstock.testing.attention_paged import (
    BRIEF,
    CROWDED,
    TOLERANCES,
    Course,
    Place,
    check_course,
    courses,
    with_tables,
)
from penstock.testing.engine.crowds import crowd
from penstock.testing.engine.machine import EngineMachine, machine_of
from penstock.testing.engine.requests import numbers
from penstock.testing.enrolled import enrolled
from penstock.testing.kept_scores import KeptRows
from penstock.testing.kv_policy import tight
from penstock.testing.paged_pieces import check_windows, shape_in
from penstock.testing.reference import greedy
from penstock.testing.serve_model import SHAPE, small_draft, small_model

#: Sizes of heads that are tried.
HEAD_DIMS = (8, 16, 18, 80)

CPU = torch.device("cpu")


def check(codec: Codec) -> None:
    """Asserts the law on the CPU."""
    check_vectors(codec)
    for backend in backends():
        check_bytes(codec, backend)
        check_attention(codec, backend, examples=8)
    check_tokens(codec, examples=4)
    check_window(codec, examples=4)
    check_evicted(codec, examples=4)


def backends() -> list[PagedAttention]:
    """The attention backends that work on the CPU of this machine."""
    known = [each for each in enrolled("attention.paged").values() if isinstance(each, PagedAttention)]
    return [each for each in known if each.serves(CPU, torch.float32, 64) is None]


def check_vectors(codec: Codec) -> None:
    """Asserts what is said of single vectors."""
    for head_dim in HEAD_DIMS:
        for heads in (3, 1) if codec.lacks(head_dim) is None else ():
            vectors = samples(head_dim)[:, :heads]
            table = codec.learn(vectors) if isinstance(codec, LearnedCodec) else None
            check_round_trip(codec, vectors, table)
            check_company(codec, vectors, table)
            check_nan(codec, vectors, table)


def samples(head_dim: int) -> Tensor:
    """Vectors [N, 3, D] of several kinds: normal ones, with large and small numbers, with one number that is far from
    all others, constant ones, and zero."""
    draw = torch_generator(head_dim, "testing/kv_codec")
    normal = torch.randn(100, 3, head_dim, generator=draw)
    outlying = normal[:40].clone()
    outlying[:, :, 1] += 30
    constant = normal[:5, :, :1].expand(-1, -1, head_dim)
    return torch.cat([normal, normal[:20] * 1e3, normal[:20] * 1e-3, outlying, constant, torch.zeros(2, 3, head_dim)])


def coded(codec: Codec, vectors: Tensor, table: Tensor | None) -> Tensor:
    """What comes back of ``vectors``."""
    stored = codec.encode(vectors, table)
    count, dtype = codec.stored(vectors.shape[-1], vectors.dtype)
    assert stored.dtype == dtype and stored.shape == (*vectors.shape[:-1], count), "it is not stored as it says"
    size = codec.vector_bytes(vectors.shape[-1], vectors.dtype)
    assert stored.numel() * stored.element_size() == vectors[..., 0].numel() * size, "it takes other bytes than it says"
    back = codec.decode(stored, vectors.shape[-1], vectors.dtype, table)
    assert back.shape == vectors.shape and back.dtype == vectors.dtype
    return back


def check_round_trip(codec: Codec, vectors: Tensor, table: Tensor | None) -> None:
    """Asserts that no number changes by more than its bound."""
    bound = codec.bound(vectors.double(), table)
    over = (coded(codec, vectors, table).double() - vectors.double()).abs() - bound
    assert (over <= 0).all(), f"a number of {vectors.shape[-1]} is off by {over.max():.3g} more than may be"


def check_company(codec: Codec, vectors: Tensor, table: Tensor | None) -> None:
    """Asserts that a vector has the same code alone, and behind or before any others, and that of a code alone comes
    what comes of it among others."""
    stored, known = codec.encode(vectors, table), (vectors.shape[-1], vectors.dtype, table)
    order = torch.randperm(len(vectors), generator=torch_generator(0, "testing/company"))
    assert torch.equal(codec.encode(vectors[order], table), stored[order]), "codes depend on the order of tokens"
    for index in (0, 7, len(vectors) - 1):
        alone = codec.encode(vectors[index : index + 1], table)
        assert torch.equal(alone[0], stored[index]), "a code depends on what is coded beside it"
        back, among = codec.decode(stored[index : index + 1], *known), codec.decode(stored, *known)
        assert torch.equal(back[0], among[index]), "a number depends on what is decoded beside it"


def check_nan(codec: Codec, vectors: Tensor, table: Tensor | None) -> None:
    """Asserts that a vector that is NaN comes back so, and no other."""
    wrong = vectors[:20].clone()
    wrong[3, -1, 2] = torch.nan
    back = coded(codec, wrong, table)
    assert back[3, -1].isnan().any() or not codec.holds_nan, "NaN is lost"
    back[3, -1] = coded(codec, vectors[:20], table)[3, -1]
    assert torch.equal(back, coded(codec, vectors[:20], table)), "NaN spreads to other vectors"


def check_bytes(codec: Codec, backend: PagedAttention) -> None:
    """Asserts that a memory takes the bytes of its blocks, and those are a formula."""
    for dtype in (torch.float32, torch.bfloat16):
        shape = CacheShape(3, 4, 2, 16, 7, 8, dtype, CPU, codec=codec)
        if backend.refuses(shape) is not None:
            continue
        taken = sum(each.nbytes for each in vars(backend.open(shape)).values() if isinstance(each, Tensor))
        assert taken == 7 * shape.block_bytes == 7 * 3 * 2 * 2 * 8 * codec.vector_bytes(16, dtype)


def check_attention(codec: Codec, backend: PagedAttention, examples: int = 0) -> None:
    """Asserts that attention over blocks is plain attention over what they decode to, after forks, moves and cuts; in
    so many ``examples`` of courses besides the usual one."""
    for dtype in (torch.float32, torch.bfloat16):
        if backend.refuses(CacheShape(1, 4, 2, 64, 1, 16, dtype, CPU, codec=codec)) is not None:
            continue
        place = Place(CPU, dtype, tuple(dim for dim in HEAD_DIMS if codec.lacks(dim) is None))
        check_course(backend, place, Course(BRIEF, 2, 2, 16, 8, (None, 30), threads=2), codec)
        latent = Course(BRIEF, 1, 2, 16, 16, (None,), latent=8, needs=frozenset({"latent"}))
        if backend.refuses(dataclasses.replace(latent.shape(place), codec=codec)) is None:
            check_course(backend, place, latent, codec)
        if "residual" in backend.knows and codec.policy_name != "plain":
            check_windowed(codec, backend, place)
        if examples:
            check_course(backend, place, Course(CROWDED, 1, 3, 64, 16, (None, 40), threads=2), codec)
            _play_courses(codec, backend, place, examples)


def check_windowed(codec: Codec, backend: PagedAttention, place: Place) -> None:
    """Asserts the same where the newest tokens are in full precision beside it."""
    windows = (None, 11) if place.device.type == "cpu" else (None, None)
    shape = shape_in(place.dtype, place.device, len(windows), place.head_dims[-1], codec)
    shape = with_tables(dataclasses.replace(shape, windows=frozenset(windows)), seed=0)
    check_windows(backend, shape, windows, TOLERANCES[place.dtype], threads=2)


def _play_courses(codec: Codec, backend: PagedAttention, place: Place, examples: int) -> None:
    @alike(examples)
    @given(course=courses(place.head_dims))
    def play(course: Course) -> None:
        check_course(backend, place, course, codec)

    play()


@dataclasses.dataclass(frozen=True)
class CodedRows:
    """Rows of whole sequences, whose every key and value is coded and decoded before it is attended to.

    Attributes:
        rows: the sequences.
        codec, learned: as of :class:`~penstock.ops.paged.contract.CacheShape`.
        window: tokens of a window in full precision, counted from the beginning; 0 is none.
    """

    rows: CausalRows
    codec: Codec
    learned: Tensor | None
    window: int = 0

    @property
    def positions(self) -> Tensor:
        return self.rows.positions

    @property
    def keeps(self) -> bool:
        return False

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        extras: Extras = PLAIN,
    ) -> Tensor:
        coded = [self._coded(layer, part, vectors) for part, vectors in enumerate((key, value))]
        if not self.window:
            return self.rows.attend(layer, query, *coded, scale=scale, window=window, extras=extras)
        # Every token has two keys, of which each query sees one: that as it was computed within its own window.
        own, places = causal_mask(self.positions, self.positions, window, extras.chunk), self.positions // self.window
        exact = own & (places.unsqueeze(-1) == places.unsqueeze(-2))
        both = [torch.cat(pair, 1) for pair in zip(coded, (key, value), strict=True)]
        mask = torch.cat([own & ~exact, exact], -1).unsqueeze(1)
        return attend_rows(query, *both, scale=scale, mask=mask, extras=extras)

    def _coded(self, layer: int, part: int, vectors: Tensor) -> Tensor:
        return come_back(self.codec, self.learned, layer, part, vectors)


def come_back(codec: Codec, learned: Tensor | None, layer: int, part: int, vectors: Tensor) -> Tensor:
    """What comes back of ``vectors`` [..., K, D], keys (0) or values (1) of a layer."""
    table = None if learned is None else learned[layer, part]
    return codec.decode(codec.encode(vectors, table), vectors.shape[-1], vectors.dtype, table)


class CodedDecoder:
    """A decoder over :class:`CodedRows`, for the reference of an engine's tokens."""

    def __init__(self, model: Decoder, codec: Codec, learned: Tensor | None) -> None:
        self._model, self._codec, self._learned, self._window = model, codec, learned, codec.residual
        self.like, self.logits, self.config = model.like, model.logits, model.config

    def __call__(self, tokens: Tensor, rows: CausalRows | KeptRows) -> Any:
        if isinstance(rows, KeptRows):
            rows.coded, rows.window = self._coded, self._window
            return self._model(tokens, rows)
        return self._model(tokens, CodedRows(rows, self._codec, self._learned, self._window))

    def _coded(self, layer: int, part: int, vectors: Tensor) -> Tensor:
        return come_back(self._codec, self._learned, layer, part, vectors)


@functools.cache
def wide_models() -> tuple[Decoder, Decoder]:
    """The small model and the one that drafts for it, in float64."""
    return copy.deepcopy(small_model()).double(), copy.deepcopy(small_draft()).double()


def machine(codec: Codec) -> type[EngineMachine]:
    """The machine of ``serve.batching``, for a cache in ``codec``."""
    model, draft = wide_models()
    if isinstance(codec, LearnedCodec):
        codec = codec.model_copy(update={"tokens": 512})
    reference = CodedDecoder(model, codec, learned_tables(model, codec))
    found = machine_of(Sarathi())
    drafts = [each for each in found.drafts if _together(codec, each[0], each[2])]
    return type(
        "CodecMachine", (found,), {"codec": codec, "models": (model, draft), "oracle": reference, "drafts": drafts}
    )


def _together(codec: Codec, drafter: Drafter | None, tree: tuple[int, ...]) -> bool:
    """Whether a codec that is not plain goes together with who drafts, as an engine's options have it: never with
    trees, and with windows in full precision only where drafts take no cache."""
    if drafter is None:
        return not tree
    apart = drafter.model is not None or drafter.head is not None
    branches = bool(tree or drafter.widths) or drafter.superposes > 1
    return not branches and not (codec.residual and apart)


def check_tokens(codec: Codec, examples: int = 0, steps: int = 20) -> None:
    """Asserts that an engine says what the reference says over coded keys and values, whatever else it serves: to a
    crowd, and in so many ``examples`` of courses of events."""
    if codec.lacks(SHAPE.head_dim) is None:
        own = machine(codec)
        crowd(own(), seed=0)
        if examples:
            run_state_machine_as_test(own, settings=alike(examples, stateful_step_count=steps))


def check_evicted(codec: Codec, examples: int = 0, steps: int = 20) -> None:
    """Asserts the same where caches are compressed besides, with and without windows in full precision, and with tokens
    of some layers in the places of others: what is kept is what the policy says of decoded keys and values, and is
    coded anew."""
    if codec.lacks(SHAPE.head_dim) is None:
        cases: list[tuple[CachePolicy, int]] = [(HeavyHitters(), 0)]
        cases += [(HeavyHitters(), 4)] if codec.policy_name != "plain" else []
        cases += [] if isinstance(codec, LearnedCodec) else [(PyramidKV(), 0)]
        for kv, window in cases:
            own = machine(codec.model_copy(update={"residual": window}))
            own.kv = tight(kv)
            own.drafts = [(None, Fixed(), ()), (Ngram(shortest=1), Fixed(), ())]
            crowd(own(), seed=0)
            if examples:
                run_state_machine_as_test(own, settings=alike(examples, stateful_step_count=steps))


def check_window(codec: Codec, examples: int = 0, steps: int = 20) -> None:
    """Asserts the same where the newest tokens of each sequence are in full precision; that the memory of these takes
    the bytes of its formula; and that with a window which covers all, tokens are those of a plain cache."""
    if codec.lacks(SHAPE.head_dim) is not None or codec.policy_name == "plain":
        return
    check_tokens(codec.model_copy(update={"residual": 4}), examples, steps)
    quick = {"tokens": 64} if isinstance(codec, LearnedCodec) else {}
    _check_turns(codec.model_copy(update={"residual": 8, **quick}))
    _check_whole(codec.model_copy(update={"residual": SHAPE.context, **quick}))


def _check_turns(codec: Codec) -> None:
    """Asserts that a fork amidst a window of 8 says what the reference does, and so does a sequence that is cut back
    into an earlier window and goes on with other tokens."""
    model, _ = wide_models()
    reference = cast(Decoder, CodedDecoder(model, codec, learned_tables(model, codec)))
    config = EngineConfig(codec=codec, loop=Plain(), sequences=3, block_size=4, cache_tokens=400, check=True)
    engine, said = build_engine(model, config), defaultdict[str, list[int]](list)
    greedily = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    prompt = numbers("window", 13)

    def told(id: str, count: int) -> list[int]:
        while len(said[id]) < count:
            for delta in engine.step():
                said[delta.id] += delta.tokens
        return said[id]

    engine.add(Request("parent", prompt, greedily))
    text = [*prompt, *told("parent", 9)]
    engine.fork("parent", Request("fork", text, greedily))
    assert told("fork", 8)[:8] == greedy(reference, text, 8), "a fork reads a window that is not its own"
    cut = [*prompt, *told("parent", 24)[:6]]
    engine.truncate("parent", len(cut))
    engine.feed("parent", [7, 3])
    said["parent"].clear()
    wanted = greedy(reference, [*cut, 7, 3], 8)
    assert told("parent", 8)[:8] == wanted, "one that is cut back reads a window that was overwritten"


def _check_whole(whole: Codec) -> None:
    """Asserts the tokens, and the bytes, of windows that cover all."""
    model, _ = wide_models()
    config = EngineConfig(codec=whole, sequences=3, block_size=4, cache_tokens=400, check=True)
    runner = build_runner(model, config)
    taken = vars(runner.cache)["_rings"].memory.nbytes
    assert taken == runner.cache.shape.residual_bytes == 3 * SHAPE.context * plain_bytes(torch.float64)
    engine, said = Engine(config, runner), defaultdict[str, list[int]](list)
    prompts = {str(number): numbers(f"window {number}", 20 + 9 * number) for number in range(3)}
    for id, prompt in prompts.items():
        engine.add(Request(id, prompt, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)))
    while engine.busy:
        for delta in engine.step():
            said[delta.id] += delta.tokens
    for id, prompt in prompts.items():
        assert said[id] == greedy(model, prompt, 30), "a window that covers all does not give what a plain cache does"


def plain_bytes(dtype: torch.dtype) -> int:
    """What a token of the small model takes in all layers where nothing is coded."""
    return 2 * SHAPE.layers * SHAPE.kv_heads * SHAPE.head_dim * dtype.itemsize
