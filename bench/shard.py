"""Training in shards, beside a plain loop of PyTorch's FSDP2 around transformers' Llama of the same shape.

On two GPUs or more: the 8 B parameters of Llama 3, fp32 masters and AdamW's moments in shards, arithmetic in bf16, one
row of 4,096 tokens a device at a time, layers compiled and computed twice. One subject at a time is in memory. Without
several GPUs, tiny shapes over gloo show that it works.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from penstock.core.bench import Bench
from penstock.core.errors import PenstockError
from penstock.data.loader import Batch
from penstock.models.blank import without_weights
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.families.llama import Llama
from penstock.parallel.world import World
from penstock.testing.timed_updates import TimedUpdates
from penstock.testing.workers import Workers, serve
from penstock.train.loop import Trainer
from penstock.train.shards.shards import Shards

LARGE = {"hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128, "ffn": 14336, "vocabulary": 128256}
TINY = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 128, "vocabulary": 512}

OURS, THEIRS = "penstock", "PyTorch FSDP2, transformers"
#: Microbatches of a device in an update, updates between two clocks, and how often.
ACCUMULATED, UPDATES, REPETITIONS = 4, 2, 3
#: Seconds for an answer: the first one builds the model and compiles.
PATIENCE = 900.0


class Subjects(TimedUpdates):
    """In a worker: both subjects by their names."""

    def __init__(self, world: World) -> None:
        super().__init__(world, {**LARGE, "tied": False}, {**TINY, "tied": False}, UPDATES, warm=2)
        draw = torch.Generator().manual_seed(world.rank)
        tokens = torch.randint(self.shape["vocabulary"], (ACCUMULATED, self.length), generator=draw)
        self.batch = Batch(tokens, tokens.roll(-1, 1), torch.zeros_like(tokens))

    def made(self, order: str) -> Callable[[int], object]:
        update = (self._ours if order == OURS else self._theirs)()

        def updated(count: int) -> None:
            for _ in range(count):
                update()

        return updated

    def _ours(self) -> Callable[[], object]:
        config = self.config(
            self.world.size * ACCUMULATED * self.length, parallel={"shard": "all"}, activation_checkpointing=True
        )
        assert config.model is not None
        assert config.precision != "auto"
        shards = Shards(config, self.world, self.device)
        with without_weights():
            model = Decoder(config.model)
        shards.fill(model, config.precision, None)
        folder = Path(tempfile.mkdtemp(prefix="penstock-bench-"))
        trainer = Trainer(config, model, None, folder, folder, self.world, None, shards)  # type: ignore[arg-type]
        if self.on_cuda:
            shards.compile()
        return lambda: trainer.update(self.batch, self.length, 1.0)

    def _theirs(self) -> Callable[[], object]:
        shape = DecoderConfig(**self.shape, context=self.length)
        config = transformers.LlamaConfig(**Llama().config_to_hub(shape), use_cache=False)
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config).train()
        mesh = init_device_mesh(self.device.type, (self.world.size,))
        rounded = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        policy = rounded if self.on_cuda else MixedPrecisionPolicy()
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        model.to_empty(device=self.device)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.to_local().normal_(std=0.02)
        model.model.rotary_emb = type(model.model.rotary_emb)(config).to(self.device)  # its frequencies are no weights
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.on_cuda:
            for layer in model.model.layers:
                layer.compile()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        return functools.partial(self._plain_update, model, optimizer)

    def _plain_update(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for row in self.batch.tokens.to(self.device).split(1):
            (model(input_ids=row, labels=row).loss / ACCUMULATED).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def main(bench: Bench) -> None:
    """Measures in a process for each GPU, or in two."""
    devices = torch.cuda.device_count()
    size, real = (devices, True) if devices > 1 else (2, False)
    setting = f"{size} devices, {'8 B parameters, 4,096 tokens, bf16' if real else 'tiny shapes, gloo'}, AdamW"
    tokens = size * ACCUMULATED * (4096 if real else 32)
    repetitions = 1 if bench.quick else REPETITIONS
    rates: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    for name in (OURS, THEIRS):
        with Workers(Path(__file__), size) as workers:
            try:
                ranks = [workers.ask(name, PATIENCE) for _ in range(repetitions)]
            except PenstockError as error:
                bench.console.print(f"left out: {name}: {error}", style="red")
                continue
        rates[name] = [UPDATES * tokens / answers[0]["seconds"] for answers in ranks]
        peaks[name] = max(rank["peak"] for answers in ranks for rank in answers) / 1e9
    tell(bench, setting, rates, peaks if real else {})


def tell(bench: Bench, setting: str, rates: dict[str, list[float]], peaks: dict[str, float]) -> None:
    """Rows of what the subjects gave; of ours alone, where the other does not run (for want of memory, say)."""
    names: dict[str, Any] = {"subject": OURS, "setting": setting}
    if OURS in rates and THEIRS in rates:
        told = {"values": rates[OURS], "peer_values": rates[THEIRS]}
        bench.compared(**names, peer=THEIRS, metric="training throughput", unit="tokens/s", **told)
    elif OURS in rates:
        bench.row(**names, metric="training throughput", unit="tokens/s", value=max(rates[OURS]))
    if OURS in peaks:
        peer: dict[str, Any] = {}
        if THEIRS in peaks:
            peer = {"peer": THEIRS, "peer_value": peaks[THEIRS], "ratio": peaks[OURS] / peaks[THEIRS]}
        unit = {"metric": "peak memory of a device", "unit": "GB", "better": "lower"}
        bench.row(**names, **unit, value=peaks[OURS], **peer)


if __name__ == "__main__":
    serve(Subjects)
