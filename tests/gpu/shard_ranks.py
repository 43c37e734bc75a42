"""A process for each GPU, which trains in shards what it is told, over NCCL; started by test_shard_cuda.py."""

from __future__ import annotations

import tempfile
import traceback
from pathlib import Path
from typing import Any, cast

import torch

from penstock.models import hub
from penstock.parallel.world import World
from penstock.testing.enrolled import enrolled
from penstock.testing.pipeline_training import LENGTH, batch
from penstock.testing.sharded_training import (
    ROWS,
    Course,
    course,
    differences,
    options,
    precise,
    trainer_of,
    write_model,
)
from penstock.testing.workers import serve

#: Some updates in bf16, whose gradients are summed in another order: of losses, relative.
ROUNDED = 2e-2

#: A model whose weights outweigh all else: its layers, hidden size and width.
LARGE = {"layers": 8, "hidden": 1024, "ffn": 4096, "heads": 8, "kv_heads": 8, "head_dim": 128}


def orders(world: World) -> Any:
    """The function from a check to what is wrong, if anything."""
    on_cuda = torch.cuda.device_count() >= world.size
    device = torch.device(f"cuda:{world.local_rank}" if on_cuda else "cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    folder, optimizers = Path(tempfile.mkdtemp()), enrolled("optim.optimizer")

    def trained(kind: str, name: str, size: int, compiled: bool = False, tensor: int = 1, **changes: Any) -> Course:
        start = folder / f"{kind} model"
        if not start.exists():
            write_model(start, kind)
        config = options(kind, precise(optimizers[name]), start, size // tensor, tensor, **changes)
        trainer = trainer_of(config, folder, world if size > 1 else None, device)
        if compiled:
            assert trainer.shards is not None
            trainer.shards.compile()
        return course(trainer)

    def memory() -> str:
        """What an update leaves allocated, beside an equal part of parameters, gradients and moments in fp32."""
        from penstock.models.config import DecoderConfig
        from penstock.models.decoder import Decoder

        start = folder / "large"
        if not start.exists():
            hub.save(Decoder(DecoderConfig(**LARGE, vocabulary=512, context=LENGTH)).initialize(0), start)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        config = options("dense", optimizers["adamw"], start, world.size, average=None, rates={})
        trainer = trainer_of(config, folder, world, device)
        own = batch(0, ROWS).each(lambda values: values[world.rank :: world.size])
        trainer.update(own, LENGTH, 1.0)
        trainer.updater.gradients(own, LENGTH, torch.ones((), device=device))
        held, wanted = torch.cuda.memory_allocated() - before, 16 * trainer.parameters / world.size
        return "" if wanted <= held <= 1.1 * wanted else f"{held / wanted:.2f} times its part is allocated"

    def check(order: str) -> str:
        try:
            if order == "memory":
                return memory()
            how, kind, name = order.split(" | ")
            how, _, divided = how.partition(", ")
            changes = {} if how in ("fp32", "compiled") else {"precision": how}
            found = trained(kind, name, world.size, how == "compiled", 2 if divided else 1, **changes)
            alone = trained(kind, name, 1, **changes)
            if not changes:
                return "; ".join(differences(found, alone))
            pairs = zip(found.reports, alone.reports, strict=True)
            far = [f"{ours[0]}, not {theirs[0]}" for ours, theirs in pairs if abs(ours[0] / theirs[0] - 1) > ROUNDED]
            return "; ".join(far)
        except Exception:  # to be told, not to end the process: the other checks need it
            return traceback.format_exc(limit=-3)

    return cast(Any, check)


if __name__ == "__main__":
    serve(orders)
