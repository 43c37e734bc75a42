"""Bits per byte against a computation token by token in float64."""

from __future__ import annotations

import dataclasses
import lzma
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.randomness import numpy_generator
from penstock.models.attention import CausalRows
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.train.evaluate import bits_per_byte, xz_bits_per_byte
from tiny_runs import MODEL

VOCABULARY = 37


@dataclasses.dataclass(frozen=True)
class Listed:
    """Documents of the given lengths in random tokens, of 3 bytes each."""

    lengths: tuple[int, ...]
    prefix: int = 0

    @property
    def documents(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def bytes(self) -> int:
        return 3 * self.tokens

    def document(self, index: int) -> np.ndarray:
        return numpy_generator(0, "documents", index).integers(VOCABULARY, size=self.lengths[index]).astype(np.int32)


def model(**changes) -> Decoder:
    shape = DecoderConfig(**{**MODEL, "vocabulary": VOCABULARY, "init_std": 0.3, **changes})
    return Decoder(shape).initialize(1).double().eval()


@torch.no_grad()
def token_by_token(decoder: Decoder, documents: Listed, window: int) -> float:
    """Each token from a forward pass of its own, over those that the evaluation says it may see.

    The first window predicts tokens 1 to ``window``; each later one starts ``window // 2`` further, and predicts the
    tokens that are left of it.
    """
    bits = 0.0
    for number in range(documents.documents):
        tokens = torch.from_numpy(documents.document(number)).long()
        bits += math.log2(VOCABULARY)
        for place in range(1, len(tokens)):
            stride = max(1, window // 2)
            start = stride * max(0, math.ceil((place - window) / stride))
            seen = tokens[start:place].unsqueeze(0)
            logits = decoder.logits(decoder(seen, CausalRows.of(place - start)).hidden[0, -1])
            bits -= float(logits.log_softmax(-1)[tokens[place]]) / math.log(2)
    return bits / documents.bytes


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    window=st.integers(1, 12),
    rows=st.integers(1, 5),
)
@settings(max_examples=25)
def test_each_token_is_predicted_once_from_what_came_before(lengths, window, rows):
    documents, decoder = Listed(tuple(lengths)), model(layers=1)
    got = bits_per_byte(decoder, documents, window=window, rows=rows)
    assert got == pytest.approx(token_by_token(decoder, documents, window), rel=1e-12)


def test_the_order_of_tokens_matters_to_the_model_of_these_tests():
    """Else the test above would show little."""
    documents, decoder = Listed((30, 30)), model()
    assert bits_per_byte(decoder, documents, window=30) != pytest.approx(
        bits_per_byte(decoder, documents, window=8), rel=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_uniform_model_needs_the_logarithm_of_its_vocabulary(dtype):
    documents, decoder = Listed((1, 2, 40, 100)), model().to(dtype)
    torch.nn.init.zeros_(decoder.head.weight)
    wanted = documents.tokens * math.log2(VOCABULARY) / documents.bytes
    assert bits_per_byte(decoder, documents, window=16) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("prefix", [1, 2, 3])
def test_what_begins_every_document_costs_nothing(prefix):
    """Bits of the tokens after it, from a pass over each document at once."""
    documents, decoder = Listed((5, 30, 11), prefix), model()
    bits = 0.0
    for number in range(3):
        tokens = torch.from_numpy(documents.document(number)).long()
        logits = decoder.logits(decoder(tokens[None, :-1], CausalRows.of(len(tokens) - 1)).hidden[0])
        chosen = logits.log_softmax(-1).gather(1, tokens[1:, None])[prefix - 1 :]
        bits -= chosen.sum().item() / math.log(2)
    assert bits_per_byte(decoder, documents, window=30) == pytest.approx(bits / documents.bytes, rel=1e-12)


def test_progress_ends_at_every_token():
    seen = []

    class Bar:
        def __init__(self, label: str, total: float | None, unit: str) -> None:
            self.total = total

        def __enter__(self):
            return self

        def __exit__(self, *_):
            seen.append(self.total)

        def advance(self, amount: float = 1, note: str = "") -> None:
            seen.append(amount)

    bits_per_byte(model(), Listed((5, 1, 50)), window=8, report=Bar)
    *parts, total = seen
    assert sum(parts) == total == 56
    assert len(parts) > 2


def test_xz_compresses_each_document_on_its_own():
    texts = [b"abc" * 100, b"def" * 100]
    wanted = sum(8 * len(lzma.compress(text, preset=9)) for text in texts) / 600
    assert xz_bits_per_byte(texts) == wanted
    assert wanted > 8 * len(lzma.compress(b"".join(texts), preset=9)) / 600
