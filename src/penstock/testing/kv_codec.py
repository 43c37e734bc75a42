"""The law of ``kv.codec``.

What each clause is there to catch:

- round trips: a scale of another vector, group or head, codes that overflow or are cut off, halves of a byte in the
  wrong order, a largest number that has no code, vectors of nothing but zeros;
- the same code in any company: a scale that is shared by tokens, so that who came together would matter;
- NaN: a sequence that went wrong and does not say so, or says so in another's place;
- bytes: a memory that is larger than what it is said to be;
- attention: codes that a kernel reads in another way than the definition, a step that is forgotten, copies and moves
  that leave a part of the code behind;
- tokens: codes that depend on the block, the chunk or the batch; a table of another layer, or of values for keys. The
  engine computes in float64 here, where no code is within rounding of another.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import torch
from hypothesis import given
from hypothesis.stateful import run_state_machine_as_test
from torch import Tensor

from penstock.core.randomness import torch_generator
from penstock.models.attention import CausalRows
from penstock.models.decoder import Decoder
from penstock.ops.attention import PLAIN, Extras
from penstock.ops.paged.codecs.contract import Codec, LearnedCodec
from penstock.ops.paged.contract import CacheShape, PagedAttention
from penstock.serve.batching.sarathi import Sarathi
from penstock.serve.calibration import learned_tables
from penstock.testing.alike import alike
from penstock.testing.attention_paged import BRIEF, CROWDED, Course, Place, check_course, courses
from penstock.testing.engine.crowds import crowd
from penstock.testing.engine.machine import EngineMachine, machine_of
from penstock.testing.enrolled import enrolled
from penstock.testing.serve_model import SHAPE, small_draft, small_model

#: Sizes of heads that are tried.
HEAD_DIMS = (8, 16, 80)

CPU = torch.device("cpu")


def check(codec: Codec) -> None:
    """Asserts the law on the CPU."""
    check_vectors(codec)
    for backend in backends():
        check_bytes(codec, backend)
        check_attention(codec, backend, examples=8)
    check_tokens(codec, examples=4)


def backends() -> list[PagedAttention]:
    """The attention backends that work on the CPU of this machine."""
    known = [each for each in enrolled("attention.paged").values() if isinstance(each, PagedAttention)]
    return [each for each in known if each.serves(CPU, torch.float32, 64) is None]


def check_vectors(codec: Codec) -> None:
    """Asserts what is said of single vectors."""
    for head_dim in HEAD_DIMS:
        if codec.lacks(head_dim) is None:
            vectors = samples(head_dim)
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
    """Asserts that a vector has the same code alone, and behind or before any others."""
    stored = codec.encode(vectors, table)
    order = torch.randperm(len(vectors), generator=torch_generator(0, "testing/company"))
    assert torch.equal(codec.encode(vectors[order], table), stored[order]), "codes depend on the order of tokens"
    for index in (0, 7, len(vectors) - 1):
        alone = codec.encode(vectors[index : index + 1], table)
        assert torch.equal(alone[0], stored[index]), "a code depends on what is coded beside it"


def check_nan(codec: Codec, vectors: Tensor, table: Tensor | None) -> None:
    """Asserts that a vector that is NaN comes back so, and no other."""
    wrong = vectors[:20].clone()
    wrong[3, 1, 2] = torch.nan
    back = coded(codec, wrong, table)
    assert back[3, 1].isnan().any() or not codec.holds_nan, "NaN is lost"
    back[3, 1] = coded(codec, vectors[:20], table)[3, 1]
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
        if "latent" in backend.knows:
            latent = Course(BRIEF, 1, 2, 16, 16, (None,), latent=8, needs=frozenset({"latent"}))
            check_course(backend, place, latent, codec)
        if examples:
            check_course(backend, place, Course(CROWDED, 1, 3, 64, 16, (None, 40), threads=2), codec)
            _play_courses(codec, backend, place, examples)


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
    """

    rows: CausalRows
    codec: Codec
    learned: Tensor | None

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
        key, value = (self._coded(layer, part, vectors) for part, vectors in enumerate((key, value)))
        return self.rows.attend(layer, query, key, value, scale=scale, window=window, extras=extras)

    def _coded(self, layer: int, part: int, vectors: Tensor) -> Tensor:
        table = None if self.learned is None else self.learned[layer, part]
        return self.codec.decode(self.codec.encode(vectors, table), vectors.shape[-1], vectors.dtype, table)


class CodedDecoder:
    """A decoder over :class:`CodedRows`, for the reference of an engine's tokens."""

    def __init__(self, model: Decoder, codec: Codec, learned: Tensor | None) -> None:
        self._model, self._codec, self._learned = model, codec, learned
        self.like, self.logits = model.like, model.logits

    def __call__(self, tokens: Tensor, rows: CausalRows) -> Any:
        return self._model(tokens, CodedRows(rows, self._codec, self._learned))


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
    return type(
        "CodecMachine", (machine_of(Sarathi()),), {"codec": codec, "models": (model, draft), "oracle": reference}
    )


def check_tokens(codec: Codec, examples: int = 0, steps: int = 20) -> None:
    """Asserts that an engine says what the reference says over coded keys and values, whatever else it serves: to a
    crowd, and in so many ``examples`` of courses of events."""
    if codec.lacks(SHAPE.head_dim) is None:
        own = machine(codec)
        crowd(own(), seed=0)
        if examples:
            run_state_machine_as_test(own, settings=alike(examples, stateful_step_count=steps))
