"""What two layers share, beside the rule token by token; and what the engine makes of it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from penstock.core.errors import PenstockError, UsageError
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.serve.build import build_engine
from penstock.serve.config import EngineConfig
from penstock.serve.kv.policies.contract import Cached
from penstock.serve.kv.policies.minicache import MiniCache, interpolated
from penstock.testing.kept_scores import packed_of
from penstock.testing.serve_model import SHAPE, small_model

LAYERS, HEADS, LENGTH, DIM = 5, 2, 20, 8


def vectors(seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(LAYERS, HEADS, LENGTH, DIM, generator=draw) * torch.rand(
        LAYERS, HEADS, LENGTH, 1, generator=draw
    )


def model(layers: int, dim: int) -> DecoderConfig:
    return SHAPE.model_copy(update={"layers": layers, "head_dim": dim})


def shared(policy: MiniCache, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What the layers have of ``keys`` and ``values`` afterwards."""
    fitted = policy.fitted(model(LAYERS, DIM))
    assert fitted.view is not None
    kept = fitted.compress(Cached(keys, values), fitted.keeps(LENGTH))
    assert kept.keys.shape == (LAYERS, HEADS, fitted.keeps(LENGTH), DIM)
    return fitted.view.restored(packed_of(fitted, kept, LENGTH))


def on_the_arc(first: list[float], second: list[float], share: float) -> list[float]:
    """In the plane of two directions: the first, turned towards the second by the share of their angle."""
    angle = math.acos(max(-1, min(1, math.fsum(one * two for one, two in zip(first, second, strict=True)))))
    across = [two - math.cos(angle) * one for one, two in zip(first, second, strict=True)]
    length = math.hypot(*across)
    turn = share * angle
    return [math.cos(turn) * one + math.sin(turn) * way / length for one, way in zip(first, across, strict=True)]


@given(seed=st.integers(0, 99), retained=st.sampled_from([0, 0.1, 0.3, 0.5]), share=st.sampled_from([0.0, 0.6, 0.5]))
def test_pairs_share_directions_and_keep_norms_and_what_is_far_apart(seed, retained, share):
    keys, values = vectors(seed), vectors(seed + 100)
    found = shared(MiniCache(start=0.2, retained=retained, interpolate=share), keys, values)
    for one, other in zip(found, (keys, values), strict=True):
        assert torch.equal(one[0], other[0]), "a shallow layer has changed"
    for first in (1, 3):
        for head in range(HEADS):
            units = [
                [
                    [(row / math.hypot(*row.tolist())).tolist() for row in each[layer, head]]
                    for layer in (first, first + 1)
                ]
                for each in (keys.double(), values.double())
            ]
            far = [max(math.dist(one[place], two[place]) for one, two in units) for place in range(LENGTH)]
            apart, order = math.ceil(retained * LENGTH), sorted(range(LENGTH), key=lambda place: -far[place])
            order = [*sorted(order[:apart]), *sorted(order[apart:])]
            for after, before, (one, two) in zip(found, (keys, values), units, strict=True):
                for side in (0, 1):
                    rows, own = after[first + side, head], before[first + side, head]
                    assert torch.equal(rows[:apart], own[order[:apart]])
                    wanted = [
                        torch.tensor(on_the_arc(one[place], two[place], share)) * math.hypot(*own[place].tolist())
                        for place in order[apart:]
                    ]
                    torch.testing.assert_close(rows[apart:], torch.stack(wanted), rtol=1e-4, atol=1e-5)


def test_layers_with_equal_directions_come_back_whatever_their_norms():
    keys, values = vectors(0), vectors(1)
    keys[2::2], values[2::2] = 3 * keys[1::2], values[1::2] / 7
    found = shared(MiniCache(start=0.2, retained=0), keys, values)
    for one, other in zip(found, (keys, values), strict=True):
        torch.testing.assert_close(one, other)


def test_what_was_merged_merges_to_itself():
    once = shared(MiniCache(start=0.2), vectors(0), vectors(1))
    for one, other in zip(shared(MiniCache(start=0.2), *once), once, strict=True):
        torch.testing.assert_close(one, other)


def test_where_all_is_retained_the_cache_stays_as_it_is():
    policy = MiniCache(retained=1)
    assert not policy.compresses
    assert policy.fitted(model(2, 8)).due(10, 0, 0) is None


@pytest.mark.parametrize(("layers", "start", "pairs"), [(30, 0.5, 7), (32, 0.5, 8), (5, 0.2, 2), (2, 0.0, 1)])
def test_places_are_those_of_the_formula(layers, start, pairs):
    policy = MiniCache(start=start, retained=0.05).fitted(model(layers, 64))
    for tokens in (1, 17, 100, 1000):
        each = tokens + math.ceil(tokens / 20) + math.ceil(2 * tokens / 64)
        assert policy.keeps(tokens) == math.ceil(((layers - 2 * pairs) * tokens + pairs * each) / layers)


def test_opposite_and_missing_directions():
    one = torch.eye(3)[0]
    for share, wanted in ((0.4, one), (0.6, -one)):
        torch.testing.assert_close(interpolated(one, -one, share), wanted)
    assert interpolated(torch.zeros(3), torch.zeros(3), 0.6).tolist() == [0, 0, 0]
    torch.testing.assert_close(interpolated(torch.zeros(3), one, 0.6), one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv": {"name": "minicache"}}, r"no layers.*kv.start"),
        ({"kv": {"name": "minicache", "start": 0, "retained": 0.9}}, r"saves nothing.*kv.retained"),
        ({"kv": {"name": "minicache", "start": 0}, "codec": "int8"}, r"norms.*bf16"),
        ({"kv": {"name": "minicache", "start": 0}, "attention": "cpu"}, "no view of norms beside directions"),
        ({"kv": {"name": "minicache", "budget": 0.5}}, "budget"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises((UsageError, PenstockError), match="(?s)" + message) as raised:
        build_engine(small_model(), EngineConfig.model_validate({"cache_tokens": 100, **options}))
    assert message.endswith(("budget", "caches")) or isinstance(raised.value, UsageError)


def test_a_model_with_windows_is_refused():
    model = Decoder(SHAPE.model_copy(update={"window": 8})).initialize(0).eval()
    with pytest.raises(UsageError, match=r"minicache.*windows"):
        build_engine(model, EngineConfig(kv=MiniCache(start=0), cache_tokens=100))
