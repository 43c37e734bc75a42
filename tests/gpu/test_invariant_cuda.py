"""The same bits alone and in any batch, on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from penstock.core.randomness import torch_generator
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.invariant import make_invariant
from penstock.ops.invariant import invariant_grouped_linear, invariant_linear, invariant_rms_norm
from penstock.ops.paged.invariant import Invariant
from penstock.testing.invariance import paged_logits

pytestmark = pytest.mark.gpu

SHAPE = {"vocabulary": 1000, "hidden": 512, "layers": 2, "heads": 8, "kv_heads": 2, "head_dim": 64, "ffn": 1536}
KINDS = {
    "dense": {"qk_norm": True, "qkv_bias": True},
    "window": {"window": 100, "windowed_layers": (0,)},
    "one key head": {"kv_heads": 1, "head_dim": 128},
    "cap, sinks and window": {"attention_cap": 0.5, "sinks": True, "window": 100, "windowed_layers": (0,)},
    "sinks and chunks": {"sinks": True, "chunked": True, "window": 1100, "windowed_layers": (0,)},
    "experts": {"moe": {"experts": 8, "ffn": 256, "shared_ffn": 128, "shared_gate": True}},
}


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("size", "height"), [(512, 768), (1500, 77), (4096, 64)])
def test_rows_of_a_product_have_the_same_bits_in_any_number(dtype: torch.dtype, size: int, height: int) -> None:
    x, weight = normal(300, size, dtype=dtype), normal(height, size, dtype=dtype, seed=1)
    bias = normal(height, dtype=dtype, seed=2)
    whole = invariant_linear(x, weight, bias)
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(whole.double(), exact, rtol=2**-7, atol=1e-3 * float(exact.abs().max()))
    for start, stop in [(0, 1), (1, 2), (7, 8), (100, 104), (63, 66), (5, 262)]:
        assert torch.equal(invariant_linear(x[start:stop], weight, bias), whole[start:stop])
    assert torch.equal(invariant_linear(x.flip(0), weight, bias).flip(0), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_tiles_agree_on_every_bit(dtype: torch.dtype, scale: float) -> None:
    """Large and small numbers in one sum, and rows at every place of a tile."""
    from penstock.ops.invariant_kernel import MANY, NARROW, WIDE, multiply

    x, weight = normal(256, 3000, dtype=dtype), normal(512, 3000, dtype=dtype, seed=1)
    x = (x.float().sinh() * scale / 10).to(dtype)
    found = [multiply(x, weight, None, None, tile) for tile in (NARROW, WIDE, MANY)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_rows_of_a_grouped_product_are_those_of_products() -> None:
    sizes = [64, 0, 40, 1, 0, 200, 3, 0]
    x, weight = normal(sum(sizes), 256, dtype=torch.bfloat16), normal(8, 96, 256, dtype=torch.bfloat16, seed=1)
    ends = torch.tensor(sizes).cumsum(0).to("cuda", torch.int32)
    got = invariant_grouped_linear(x, weight, ends)
    wanted = [invariant_linear(rows, own) for rows, own in zip(x.split(sizes), weight, strict=True) if len(rows)]
    assert torch.equal(got, torch.cat(wanted))


def test_norms_have_the_same_bits_in_any_number() -> None:
    x, weight = normal(300, 1000, dtype=torch.bfloat16), normal(1000, dtype=torch.bfloat16, seed=1)
    whole = invariant_rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(whole, torch.nn.functional.rms_norm(x, (1000,), weight, 1e-6), rtol=2**-6, atol=1e-3)
    assert torch.equal(torch.cat([invariant_rms_norm(row, weight, 1e-6) for row in x.split(1)]), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_logits_have_the_same_bits_alone_and_in_any_batch(kind: str, dtype: torch.dtype) -> None:
    """Alone, in one pass, against: decoded token by token, in chunks, in batches, with a beginning that is shared.
    Texts are long enough for several pieces of keys."""
    model = Decoder(DecoderConfig(**{**SHAPE, **KINDS[kind]}, init_std=0.1)).initialize(4).to("cuda", dtype).eval()
    model = make_invariant(model)
    draw = torch_generator(0, "invariant")
    common = torch.randint(1000, (1024,), generator=draw).tolist()
    lengths = [2300, 1100, 1025, 1500]
    texts = [common + torch.randint(1000, (n - 1024,), generator=draw).tolist() for n in lengths]
    passes = [
        [(0, 1000)],
        [(0, 24)],
        *[[(n, 1) for n in range(4)]],
        [(0, 300), (1, 75)],
        *[[(0, 1), (3, 1)]] * 20,
        [(3, 455), (0, 300)],
        [(0, 655)],
    ]
    together = paged_logits(model, Invariant(), texts, passes, shared=64)
    for number, text in enumerate(texts):
        alone = paged_logits(model, Invariant(), [text], [[(0, len(text))]])[0]
        first = 1024 if number else 0
        assert torch.equal(together[number][first:], alone[first:])
