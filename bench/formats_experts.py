"""Experts in each format of weights on a GPU: the time of all that follows the router, by the number of tokens.

Some layers in the shape of Qwen3-30B-A3B with random weights, in bf16, in the formats of ``formats_cuda``, and in
MXFP4; on a CPU, where it only shows that it works, small ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from penstock.core.bench import Bench, load
from penstock.ops.experts import mixed_experts
from penstock.ops.quantized.codebook import Codebook4
from penstock.ops.quantized.contract import Packed, PackedStack

formats = load("formats_cuda")

MXFP4 = "MXFP4"


def in_fp4(rows: int, columns: int, device: torch.device) -> Packed:
    """Random numbers of about the size that ``formats_cuda`` has."""
    values = torch.randint(256, (rows, columns // 2), dtype=torch.uint8, device=device)
    scale = torch.full((rows, columns // 32), 2.0**-12, device=device)
    return Packed(Codebook4(table="fp4", group=32), {"values": values, "scale": scale})


class Experts(NamedTuple):
    """Those of some layers: how many there are in each, how many of them a token goes to, and their sizes."""

    layers: int
    count: int
    top: int
    hidden: int
    ffn: int


Matrices = Tensor | PackedStack
KINDS = {formats.PLAIN: None, **formats.FORMATS, MXFP4: in_fp4}
#: The experts of Qwen3-30B-A3B, in as many layers as do not fit into the second cache, and small ones.
SPARSE, FEW = Experts(4, 128, 8, 2048, 768), Experts(2, 8, 2, 256, 128)


def experts_of(
    shape: Experts, make: Callable[[int, int, torch.device], Packed] | None, device: torch.device
) -> list[list[Matrices]]:
    """Of each layer gate and up, and down."""
    layers: list[list[Matrices]] = []
    for _ in range(shape.layers):
        sizes = (2 * shape.ffn, shape.hidden), (shape.hidden, shape.ffn)
        if make is None:
            plain = (torch.empty(shape.count, *size, dtype=torch.bfloat16, device=device) for size in sizes)
            layers.append([each.uniform_(-1e-3, 1e-3) for each in plain])
        else:
            layers.append([PackedStack([kept(make(shape.count * m, k, device))], shape.count) for m, k in sizes])
    return layers


def kept(packed: Packed) -> Packed:
    """The same as models keep it."""
    return Packed(packed.format, packed.format.arranged(packed.parts))


@torch.inference_mode()
def experts_sweep(
    shape: Experts, layers: Sequence[Sequence[Matrices]], tokens: int, device: torch.device
) -> Callable[[], object]:
    """Computes what the experts of all ``layers`` make of so many ``tokens``, which go to any; on CUDA compiled, and as
    one graph, as engines have it."""
    compute = torch.compile(mixed_experts, dynamic=True) if device.type == "cuda" else mixed_experts
    x = torch.randn(tokens, shape.hidden, dtype=torch.bfloat16, device=device)
    scores = torch.rand(shape.layers, tokens, shape.count, device=device)
    chosen = scores.topk(shape.top, -1).indices
    weights = torch.full((tokens, shape.top), 1 / shape.top, device=device)

    @torch.inference_mode()
    def run() -> None:
        for (gate_up, down), experts in zip(layers, chosen, strict=True):
            compute(x, experts, weights, gate_up, down)

    return formats.captured(run, device)


def measure_experts(bench: Bench, name: str, shape: Experts) -> None:
    """Time of what follows the router, beside bf16's."""
    models = {each: experts_of(shape, make, bench.device) for each, make in KINDS.items()}
    for tokens in formats.ROWS[: 2 if bench.quick else None]:
        setting = f"{name}: experts of {shape.layers} layers, {tokens} token{'s' * (tokens > 1)}"
        runs = {
            each: functools.partial(formats.milliseconds, bench, experts_sweep(shape, layers, tokens, bench.device))
            for each, layers in models.items()
        }
        found = bench.turns(runs, setting, formats.REPETITIONS)
        for each in [*formats.FORMATS, MXFP4]:
            bench.compared(
                subject=each, peer=formats.PLAIN, setting=setting, metric="time of the experts", unit="ms",
                better="lower", values=found[each], peer_values=found[formats.PLAIN],
            )  # fmt: skip


def main(bench: Bench) -> None:
    """Measures on the device of ``bench``."""
    if bench.device.type == "cuda":
        measure_experts(bench, "Qwen3-30B-A3B shape", SPARSE)
    else:
        measure_experts(bench, "small experts", FEW)
