"""Coupled quantization: codebooks that are learned for several channels together."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch

from penstock.core.errors import ConfigError
from penstock.ops.paged.codecs.coupled import Coupled, lloyd, packed, product_books, unpacked
from penstock.policy import create


def gaussian(correlation: float, channels: int = 4, count: int = 4000) -> torch.Tensor:
    """Vectors [N, 1, c] of variance 1, any two channels so far correlated."""
    draw = torch.Generator().manual_seed(0)
    common, own = torch.randn(count, 1, generator=draw), torch.randn(count, channels, generator=draw)
    return (math.sqrt(correlation) * common + math.sqrt(1 - correlation) * own).unsqueeze(1)


def error(codec: Coupled, vectors: torch.Tensor) -> float:
    table = codec.learn(vectors)
    back = codec.decode(codec.encode(vectors, table), vectors.shape[-1], torch.float32, table)
    return float((back - vectors).square().mean())


@pytest.mark.parametrize(("channels", "bits"), [(1, 2), (2, 8), (4, 8), (4, 6), (8, 10), (8, 4)])
def test_a_step_of_lloyd_never_makes_a_codebook_worse(channels, bits):
    points = gaussian(0.7, channels, 1500).permute(1, 0, 2)
    books = product_books(points, bits)
    assert books.shape == (1, 2**bits, channels)
    before = math.inf
    for _ in range(6):
        now = float(torch.cdist(points.double(), books.double()).amin(-1).square().mean())
        assert now <= before * (1 + 1e-6)
        before, books = now, lloyd(points, books, 1)


def test_coupling_gains_on_correlated_channels_and_less_on_independent_ones():
    gains = {}
    for correlation in (0.0, 0.8):
        vectors = gaussian(correlation)
        alone, coupled = (error(Coupled(channels=c, bits=2 * c, steps=20), vectors) for c in (1, 4))
        gains[correlation] = alone / coupled
    assert gains[0.8] > 1.3 * gains[0.0] > 1.0, gains


def test_together_codes_tell_no_more_than_one_by_one():
    """The entropy of the codes of coupled channels is below the sum of those of each."""
    vectors = gaussian(0.8, 2)
    codec = Coupled(channels=1, bits=3)
    table = codec.learn(vectors)
    codes = unpacked(codec.encode(vectors, table), 2, 3)[:, 0].tolist()

    def entropy(found: list[object]) -> float:
        return -sum(n / len(found) * math.log2(n / len(found)) for n in Counter(found).values())

    assert entropy([tuple(code) for code in codes]) < sum(entropy([code[c] for code in codes]) for c in (0, 1)) - 0.3


@pytest.mark.parametrize("bits", [1, 3, 4, 8, 10])
def test_codes_are_packed_without_a_bit_between_them(bits):
    codes = torch.randint(2**bits, (5, 7), generator=torch.Generator().manual_seed(0))
    stored = packed(codes, bits)
    assert stored.shape == (5, -(-7 * bits // 8)) and torch.equal(unpacked(stored, 7, bits), codes)
    number = sum(code << place * bits for place, code in enumerate(codes[0].tolist()))
    assert bytes(stored[0].tolist()) == number.to_bytes(-(-7 * bits // 8), "little")


def test_a_code_is_that_of_the_nearest_centroid_by_brute_force():
    codec, vectors = Coupled(channels=2, bits=4), gaussian(0.5, 6, 200)
    table = codec.learn(vectors)
    codes = unpacked(codec.encode(vectors, table), 3, 4)
    for token, group in itertools.product(range(0, 200, 17), range(3)):
        own = vectors[token, 0, 2 * group : 2 * group + 2].tolist()
        distances = [math.dist(own, centroid) for centroid in table[0, group].tolist()]
        assert distances[codes[token, 0, group]] == pytest.approx(min(distances), rel=1e-5)


@pytest.mark.parametrize(("channels", "bits", "wanted"), [(2, 8, 32), (4, 8, 16), (8, 8, 8), (8, 10, 10), (4, 12, 24)])
def test_a_vector_takes_bits_by_channels(channels, bits, wanted):
    assert Coupled(channels=channels, bits=bits).vector_bytes(64, torch.float32) == wanted


def test_channels_that_do_not_fit_a_head_are_refused():
    assert Coupled(channels=8).lacks(20) == "heads of 20 numbers cannot be cut into groups of 8 channels"
    assert Coupled(channels=4).lacks(20) is None
    with pytest.raises(ConfigError, match="bits"):
        create("kv.codec", "coupled", bits=13)
