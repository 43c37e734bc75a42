"""New keys and values that are coded and stored by one kernel: to the bit what the codec's own arithmetic stores."""

from __future__ import annotations

import math

import pytest
import torch

from penstock.core.randomness import torch_generator
from penstock.ops.paged.codecs.fp8 import E4M3, LARGEST, Fp8
from penstock.ops.paged.cuda import store_fp8

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
BLOCKS, BLOCK = 40, 16


class Scene:
    """``tokens`` whose query, key and value lie side by side, as a projection leaves them, and where they go."""

    def __init__(self, tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
        draw = torch_generator(0, "store", tokens, heads, kv_heads, dim)
        # Of any size that a number has: what is cut off, what has few bits left, and what is 0.
        together = torch.randn(tokens, heads + 2 * kv_heads, dim, generator=draw)
        together *= torch.randint(-14, 4, together.shape, generator=draw).double().exp2()
        self.query, self.key, self.value = together.to(DEVICE, dtype).split((heads, kv_heads, kv_heads), 1)
        self.scales = (0.001 + torch.rand(2, kv_heads, generator=draw)).to(DEVICE) / 100
        self.memory = torch.full((BLOCKS, 2, BLOCK, kv_heads, dim), 77, dtype=torch.uint8, device=DEVICE)
        self.slots = torch.randperm(BLOCKS * BLOCK, generator=draw)[:tokens].to(DEVICE)

    def wanted(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The query and the memory by the codec's plain arithmetic."""
        memory = self.memory.clone()
        for part, vectors in enumerate((self.key, self.value)):
            memory[self.slots // BLOCK, part, self.slots % BLOCK] = Fp8().encode(vectors, self.scales[part])
        own = self.scales[0].repeat_interleave(self.query.shape[1] // self.key.shape[1])
        return (self.query * own[:, None]).to(self.query.dtype), memory

    def stored(self) -> torch.Tensor:
        return store_fp8(self.query, self.key, self.value, self.memory, self.slots, self.scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(32, 8, 128), (16, 16, 64), (14, 2, 64), (5, 1, 128), (12, 6, 256), (3, 3, 64)]
)
@pytest.mark.parametrize("tokens", [1, 16, 131])
@torch.inference_mode()
def test_what_is_stored_is_what_the_codec_says(
    tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    scene = Scene(tokens, heads, kv_heads, dim, dtype)
    query, memory = scene.wanted()
    assert torch.equal(scene.stored(), query)
    assert torch.equal(scene.memory, memory)


@pytest.mark.parametrize("scale", [1.0, 0.3, 2.0**-40, 3e-38])
@torch.inference_mode()
def test_every_number_has_the_code_that_the_codec_gives_it(scale: float) -> None:
    """All that bfloat16 has, infinities and those that are not numbers too; and all ties between two codes."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    codes = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    ties = (codes[1:] + codes[:-1]) / 2
    beside = torch.cat([codes, ties, ties.nextafter(codes[1:]), ties.nextafter(codes[:-1]), codes[-1:] + LARGEST])
    for numbers in (every, torch.cat([beside, -beside]) * scale):
        # The sign of what is not a number is nobody's business.
        numbers = torch.where(numbers.isnan(), math.nan, numbers)
        vectors = torch.nn.functional.pad(numbers, (0, -len(numbers) % 128)).view(-1, 1, 128).to(DEVICE)
        memory = torch.zeros(-(-len(vectors) // BLOCK), 2, BLOCK, 1, 128, dtype=torch.uint8, device=DEVICE)
        slots, scales = torch.arange(len(vectors), device=DEVICE), torch.tensor([[scale], [2 * scale]], device=DEVICE)
        store_fp8(vectors, vectors, vectors, memory, slots, scales)
        for part, own in enumerate(scales):
            found = memory[:, part].flatten(0, 1)[: len(vectors)]
            assert torch.equal(found, Fp8().encode(vectors, own))


@torch.inference_mode()
def test_a_captured_graph_stores_what_lies_in_its_memory_when_it_is_replayed() -> None:
    scene, other = Scene(16, 8, 2, 128, torch.bfloat16), Scene(16, 32, 8, 128, torch.bfloat16)
    scene.stored()  # where it is compiled
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        query = scene.stored()
    for mine, theirs in ((scene.query, other.query), (scene.key, other.key), (scene.value, other.value)):
        mine.copy_(theirs[:, : mine.shape[1]])
    scene.slots.copy_(other.slots)
    scene.memory.fill_(77)
    wanted, memory = scene.wanted()
    graph.replay()
    assert torch.equal(query, wanted)
    assert torch.equal(scene.memory, memory)
