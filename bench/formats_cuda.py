"""Formats of weights on a GPU: tokens a second of the 8B shape in each, and its products beside what memory allows.

Random weights in the shape of Qwen3-8B: in bf16; in fp8 with a scale for each row, and with one for each block of 128
rows and columns; and in 4 bits with a scale for each 128 columns (W4A16). Embedding and head are bf16 in all. First
the products of a step alone, those of all layers one after the other in one graph, by the number of rows: their time
beside that of bf16, and the share of the copy rate at which they read the weights. Then greedy requests, 1 to 256 at
a time, of 16 tokens in, decoding alone. ``bench formats --device cuda`` runs this; on a CPU it only shows that it
works.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from penstock.core.bench import Bench, load
from penstock.core.garbage import settled
from penstock.core.progress import show
from penstock.models.blank import without_weights
from penstock.models.decoder import Decoder
from penstock.models.linear import Linear
from penstock.models.quantized import QuantizedLinear
from penstock.ops.quantized.contract import Packed
from penstock.ops.quantized.fp8 import Fp8
from penstock.ops.quantized.integers import Int4
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request

serve = load("serve")

PLAIN, FOUR_BITS = "bf16", "W4A16, groups of 128"
#: Rows of a product, requests at a time, tokens of each one's prompt and answer, and how often all is measured.
ROWS, CROWDS, PROMPT, ANSWER, REPETITIONS = (1, 16, 32, 64, 256), (1, 16, 64, 256), 16, 64, 3
#: Passes over all layers that are timed together.
PASSES = 10
#: MARLIN (Frantar et al., 2024), and up to how many rows it speaks of a gain.
PAPER, CLAIMED = 223, 128
#: Up to how many rows products are to be "close to" four times as fast, which is taken for three times at the least.
NEAR, LEAST = 32, 3.0


def rows_in_fp8(rows: int, columns: int, device: torch.device) -> Packed:
    """Random numbers of about the size that :func:`serve.random_model` gives, with a scale for each row."""
    values = torch.empty(rows, columns, dtype=torch.bfloat16, device=device).uniform_(-448, 448)
    scale = torch.full((rows, 1), 1e-3 / 448, device=device)
    return Packed(Fp8(rounds=True), {"values": values.to(torch.float8_e4m3fn), "scale": scale})


def blocks_in_fp8(rows: int, columns: int, device: torch.device) -> Packed:
    """The same, with a scale for each block, as rows have it."""
    packed = rows_in_fp8(rows, columns, device)
    scale = packed.parts["scale"].repeat(1, columns // 128)
    return Packed(Fp8(group=128, rounds=True), {**packed.parts, "scale": scale})


def in_four_bits(rows: int, columns: int, device: torch.device) -> Packed:
    """The same, with a scale for each group of columns."""
    values = torch.randint(256, (rows, columns // 2), dtype=torch.uint8, device=device)
    scale = torch.full((rows, columns // 128), 1e-3 / 8, device=device)
    return Packed(Int4(group=128), {"values": values, "scale": scale})


FORMATS = {"fp8 by row": rows_in_fp8, "fp8 by block": blocks_in_fp8, FOUR_BITS: in_four_bits}


def quantized(plain: Decoder, make: Callable[[int, int, torch.device], Packed]) -> Decoder:
    """A model of the shape of ``plain``, which has the rest in common with it, with matrices in a format."""
    device = plain.like.device
    with without_weights():
        model = Decoder(plain.config)
    for name, module in list(model.layers.named_modules(prefix="layers")):
        if type(module) is Linear:
            packed = make(module.out_features, module.in_features, device)
            model.set_submodule(name, QuantizedLinear([packed], None))
    ours = dict(plain.named_parameters(remove_duplicate=False))
    model.load_state_dict({name: ours[name] for name in model.state_dict()}, assign=True)
    model.rotary.to(device)
    return model.eval()


def products(model: Decoder) -> Iterator[nn.Module]:
    """The products of a step, in their order, without the head."""
    return (module for module in model.layers.modules() if isinstance(module, Linear | QuantizedLinear))


def weight_bytes(model: Decoder) -> int:
    """What the products read of the weights."""
    return sum(part.nbytes for module in products(model) for part in (*module.parameters(), *module.buffers()))


def width(module: nn.Module) -> int:
    """Columns of its matrix."""
    return module.pieces()[0].shape[1] if isinstance(module, QuantizedLinear) else module.in_features


@torch.inference_mode()
def sweep(model: Decoder, rows: int) -> Callable[[], object]:
    """Computes the products of a step with so many ``rows``; on CUDA as one graph."""
    device = model.like.device
    layers = list(products(model))
    given: dict[int, Tensor] = {
        size: torch.randn(rows, size, dtype=torch.bfloat16, device=device) for size in set(map(width, layers))
    }

    @torch.inference_mode()
    def run() -> None:
        for layer in layers:
            layer(given[width(layer)])

    return captured(run, device)


def captured(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The same; on CUDA, as one graph."""
    if device.type != "cuda":
        return run
    run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        run()
    return functools.partial(replay, graph, run)


def replay(graph: torch.cuda.CUDAGraph, run: Callable[[], object]) -> None:
    """Replays the ``graph`` of ``run``, which has what is read there, and keeps it in memory."""
    graph.replay()


def milliseconds(bench: Bench, run: Callable[[], object]) -> float:
    """Of one of :data:`PASSES` in a row."""

    def several() -> None:
        for _ in range(PASSES):
            run()

    return 1e3 * bench.seconds(several) / PASSES


def measure_products(bench: Bench, shape: str, models: dict[str, Decoder]) -> None:
    """Time of a step's products, beside bf16's and beside the copy rate."""
    rate = serve.copy_rate(bench.device)
    for rows in ROWS[: 2 if bench.quick else None]:
        setting = f"{shape}: products of a step, {rows} row{'s' * (rows > 1)}"
        runs = {name: functools.partial(milliseconds, bench, sweep(model, rows)) for name, model in models.items()}
        found = bench.turns(runs, setting, REPETITIONS)
        for name, values in found.items():
            if name != PLAIN:
                bench.compared(
                    subject=name, peer=PLAIN, setting=setting, metric="time of the products", unit="ms",
                    better="lower", values=values, peer_values=found[PLAIN], papers=evidence(name, rows),
                    least=LEAST if evidence(name, rows) and rows <= NEAR else None,
                )  # fmt: skip
            shares = [weight_bytes(models[name]) / rate / (1e-3 * value) for value in values]
            bench.measured(subject=name, setting=setting, metric="share of the copy rate", unit="", values=shares)


def evidence(name: str, rows: int) -> tuple[int, ...]:
    """The papers whose claim a row tests."""
    return (PAPER,) if name == FOUR_BITS and rows <= CLAIMED else ()


def decoding(engine: Engine, crowd: int) -> float:
    """Tokens a second of so many requests at a time, once each has its first."""
    engine.memory.pool.forget()
    sampling = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    begun = engine.snapshot().output_tokens
    for number in range(crowd):  # prompts that have nothing in common
        engine.add(Request(str(number), [3 + number] * PROMPT, sampling))
    while engine.snapshot().output_tokens < begun + crowd:
        engine.step()
    before, clock = engine.snapshot().output_tokens, time.perf_counter()
    while engine.busy:
        engine.step()
    return (engine.snapshot().output_tokens - before) / (time.perf_counter() - clock)


def measure_decoding(bench: Bench, shape: str, models: dict[str, Decoder]) -> None:
    """Tokens a second by how many requests there are at a time."""
    crowds = CROWDS[: 2 if bench.quick else None]
    config = EngineConfig(
        sequences=max(crowds), tokens=max(*crowds, 128), cache_tokens=max(crowds) * 2 * (PROMPT + ANSWER), memory=0.95
    )
    engines = {name: build_engine(model, config, report=show) for name, model in models.items()}
    with settled():  # as a server is
        for crowd in crowds:
            setting = f"{shape}: {crowd} at a time, {PROMPT} in and {ANSWER} out"
            runs = {name: functools.partial(decoding, engine, crowd) for name, engine in engines.items()}
            found = bench.turns(runs, setting, REPETITIONS)
            for name in FORMATS:
                bench.compared(
                    subject=name, peer=PLAIN, setting=setting, metric="throughput", unit="tokens/s",
                    values=found[name], peer_values=found[PLAIN], papers=evidence(name, crowd),
                )  # fmt: skip


def main(bench: Bench) -> None:
    """Measures on the device of ``bench``."""
    if bench.device.type == "cuda":
        shape = "Qwen3-0.6B shape" if bench.quick else "Qwen3-8B shape"
        plain = serve.random_model(serve.SHAPES[shape], bench.device)
    else:
        shape, plain = "120 M", serve.random_model(serve.SMALL, bench.device)
    models = {PLAIN: plain} | {name: quantized(plain, make) for name, make in FORMATS.items()}
    measure_products(bench, shape, models)
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()  # of the graphs
    measure_decoding(bench, shape, models)
