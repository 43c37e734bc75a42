"""A Decoder's logits have the same bits alone and in any batch, on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.randomness import torch_generator
from penstock.models.attention import CausalRows
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.invariant import make_invariant
from penstock.ops.paged.invariant import Invariant
from penstock.testing.invariance import paged_logits

CPU = torch.device("cpu")
SHAPE = {"vocabulary": 61, "hidden": 40, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 20, "ffn": 36}
KINDS = {
    "dense": {"qk_norm": True, "qkv_bias": True},
    "window": {"window": 9, "windowed_layers": (0,)},
    "cap, sinks and chunks": {
        "attention_cap": 0.5,
        "sinks": True,
        "chunked": True,
        "window": 9,
        "windowed_layers": (0,),
    },
    "experts": {"moe": {"experts": 5, "ffn": 12, "shared_ffn": 11, "shared_gate": True}},
    "sigmoid experts": {"moe": {"experts": 5, "ffn": 12, "router": {"name": "sigmoid", "top_k": 3}}},
}

if (reason := Invariant().serves(CPU, torch.float32, 16)) is not None:
    pytest.skip(reason, allow_module_level=True)


def decoder(kind: str, dtype: torch.dtype) -> Decoder:
    return Decoder(DecoderConfig(**SHAPE, init_std=0.3, **KINDS[kind])).initialize(4).to(dtype)


def texts(lengths: list[int]) -> list[list[int]]:
    """Texts of such lengths, all with the same beginning."""
    draw = torch_generator(0, "invariant")
    common = torch.randint(61, (200,), generator=draw).tolist()
    return [common[:32] + torch.randint(61, (200,), generator=draw).tolist()[: n - 32] for n in lengths]


@st.composite
def passes(draw: st.DrawFn, lengths: list[int], done: list[int]) -> list[list[tuple[int, int]]]:
    """Chunks of any size, of any texts together, and single tokens among them."""
    done, found = list(done), []
    while open_ := [n for n, length in enumerate(lengths) if done[n] < length]:
        members = draw(st.lists(st.sampled_from(open_), min_size=1, max_size=len(open_), unique=True))
        one = []
        for n in members:
            left = lengths[n] - done[n]
            one.append((n, draw(st.one_of(st.just(1), st.just(left), st.integers(1, left)))))
            done[n] += one[-1][1]
        found.append(one)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4)
@given(
    lengths=st.lists(st.integers(33, 70), min_size=2, max_size=4),
    shared=st.integers(0, 2),
    threads=st.integers(1, 3),
    data=st.data(),
)
def test_logits_have_the_same_bits_alone_and_in_any_batch(kind, dtype, lengths, shared, threads, data):
    """Alone, one token at a time after a prompt of one pass, against: in a batch, in any chunks, with the blocks of
    a common beginning shared, on any number of threads."""
    model, own = make_invariant(decoder(kind, dtype)), texts(lengths)
    mixed = data.draw(passes(lengths, [16 * shared if n else 0 for n in range(len(lengths))]))
    # The blocks that are shared have to be computed before anybody reads them.
    mixed = [[(0, 32)], *without(mixed, 32)]
    torch.set_num_threads(threads)
    try:
        together = paged_logits(model, Invariant(), own, mixed, shared)
    finally:
        torch.set_num_threads(1)
    for number, text in enumerate(own):
        alone = paged_logits(model, Invariant(), [text], [[(0, 30)], *[[(0, 1)]] * (len(text) - 30)])[0]
        first = 16 * shared if number else 0
        assert torch.equal(together[number][first:], alone[first:])


def without(mixed: list[list[tuple[int, int]]], count: int) -> list[list[tuple[int, int]]]:
    """The passes less the first ``count`` tokens of text 0."""
    kept = []
    for one in mixed:
        left = []
        for text, tokens in one:
            taken = min(tokens, count) if text == 0 else 0
            count -= taken
            if tokens > taken:
                left.append((text, tokens - taken))
        if left:
            kept.append(left)
    return kept


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_model_computed(kind):
    """To rounding, in float64, where the tables of angles alone are float32."""
    tokens = torch.tensor(texts([50]))
    with torch.no_grad():
        plain = decoder(kind, torch.float64)
        wanted = plain.logits(plain(tokens, CausalRows.of(50)).hidden)
        changed = make_invariant(decoder(kind, torch.float64))
        got = changed.logits(changed(tokens, CausalRows.of(50)).hidden)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert not torch.equal(got, torch.zeros_like(got))


def test_a_tied_head_stays_tied():
    model = make_invariant(Decoder(DecoderConfig(**SHAPE, tied=True)))
    assert model.head.weight is model.embedding.weight
