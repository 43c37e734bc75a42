"""Training throughput against transformers' Llama of the same shape.

On the CPU: about 15 M parameters, against a plain PyTorch loop, in fp32, and in bf16 where products are faster in it.
On CUDA: about 1.2 B parameters on sequences of 4,096 tokens in bf16, against the compiled model with its default
attention.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from penstock.core.bench import Bench
from penstock.core.config import build
from penstock.core.devices import peak_flops
from penstock.core.errors import PenstockError
from penstock.core.processor import fast_dtype
from penstock.data.loader import Loader
from penstock.data.samplers.sequential import Sequential
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.families.llama import Llama
from penstock.train.config import TrainConfig
from penstock.train.loop import Trainer

SMALL = {"hidden": 384, "layers": 7, "heads": 6, "kv_heads": 6, "head_dim": 64, "ffn": 1024, "vocabulary": 8192}
LARGE = {"hidden": 2048, "layers": 17, "heads": 16, "kv_heads": 8, "head_dim": 128, "ffn": 8192, "vocabulary": 32000}
#: Rows of a microbatch on CUDA, and microbatches of an update: about 131 k tokens, as models of this size are trained
#: with. Two rows, not four: both subjects' states are in memory, and the activations of either must fit beside them.
ROWS, ACCUMULATED = 2, 16


class RandomTokens:
    """A token stream without end-of-text: rows that are one document each."""

    def __init__(self, tokens: int, vocabulary: int) -> None:
        self.tokens = tokens
        self._ids = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(0)).numpy()

    def read(self, start: int, count: int):
        """Tokens [start, start + count), and one document for all."""
        return self._ids[start : start + count].astype("int32"), torch.zeros(count, dtype=torch.int32).numpy()


def ours(
    bench: Bench, shape: dict[str, int], length: int, rows: int, microbatches: int, precision: str
) -> Callable[[], float]:
    """A function that makes updates with our trainer and returns tokens/s."""
    model = {**shape, "context": length, "tied": shape is SMALL}
    optim = {"name": "adamw", "lr": 1e-4}
    total = microbatches * rows
    batch = {"tokens": total * length, "micro_tokens": rows * length, "stages": [{"length": length}]}
    tree = {"model": model, "batch": batch, "optim": optim, "precision": precision, "steps": 1000}
    config = build(TrainConfig, tree)
    decoder = Decoder(DecoderConfig(**model)).to(bench.device)
    loader = Loader(RandomTokens(total * length + 1, shape["vocabulary"]), length=length, sampler=Sequential(), seed=0)
    trainer = Trainer(config, decoder, loader, Path(), Path(tempfile.gettempdir()))
    trainer.compile()
    return lambda: _tokens_per_s(bench, total * length, lambda: trainer.update(loader.batch(0, total), length, 1.0))


def theirs(
    bench: Bench, shape: dict[str, int], length: int, rows: int, microbatches: int, precision: str
) -> Callable[[], float]:
    """The same with transformers' Llama, its own loss, and AdamW, in a plain loop."""
    on_cuda = bench.device.type == "cuda"
    config = DecoderConfig(**shape, context=length, tied=shape is SMALL)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**Llama().config_to_hub(config), use_cache=False))
    model = model.to(bench.device, torch.bfloat16 if precision == "bf16" else torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=on_cuda)
    forward = torch.compile(model) if on_cuda else model
    tokens = torch.randint(shape["vocabulary"], (rows, length), device=bench.device)

    def update() -> None:
        for _ in range(microbatches):
            (forward(input_ids=tokens, labels=tokens).loss / microbatches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return lambda: _tokens_per_s(bench, microbatches * rows * length, update)


def _tokens_per_s(bench: Bench, tokens: int, update: Callable[[], object]) -> float:
    count = 3 if bench.device.type == "cpu" else 1
    if bench.device.type == "cpu":
        return count * tokens / bench.seconds(lambda: [update() for _ in range(count)])
    # The two subjects share the memory: what the other one keeps aside is freed, and one update takes it anew.
    torch.cuda.empty_cache()
    update()
    retries = torch.cuda.memory_stats()["num_alloc_retries"]
    seconds = bench.seconds(lambda: [update() for _ in range(count)])
    if torch.cuda.memory_stats()["num_alloc_retries"] > retries:
        raise PenstockError("the two subjects do not fit in the memory together; the time would not be either's own")
    return count * tokens / seconds


def main(bench: Bench) -> None:
    """Measures on the device of ``bench``."""
    on_cpu = bench.device.type == "cpu"
    shape, length, rows, microbatches = (SMALL, 512, 4, 1) if on_cpu else (LARGE, 4096, ROWS, ACCUMULATED)
    name = "15 M parameters" if on_cpu else "1.2 B parameters, 4,096 tokens"
    fast = fast_dtype(bench.device).choice is torch.bfloat16
    for precision in ("fp32",) * on_cpu + ("bf16",) * fast:
        run = ours(bench, shape, length, rows, microbatches, precision)
        peer_run = theirs(bench, shape, length, rows, microbatches, precision)
        row = bench.compare(
            subject="penstock",
            peer="transformers, plain loop" if on_cpu else "transformers, compiled",
            setting=f"{name}, {precision}",
            metric="training throughput",
            unit="tokens/s",
            run=run,
            peer_run=peer_run,
            repetitions=5 if not on_cpu else 7,
        )
        peak = peak_flops(bench.device)
        if peak is not None:
            flops = 3 * DecoderConfig(**shape, context=length).flops_per_token(length)
            bench.row(
                subject="penstock",
                setting=f"{name}, {precision}",
                metric="MFU of the data sheet's bf16 rate",
                unit="",
                value=row.value * flops / peak,
                peer="transformers, compiled",
                peer_value=row.peer_value * flops / peak,
                ratio=row.ratio,
            )
        del run, peer_run
        gc.collect()
