"""Compiling the loss, and what tells whether that pays: how long the passes of an update take without."""

from __future__ import annotations

import time
from collections.abc import Callable, Set

from torch import Tensor

from penstock.core.devices import can_compile, synchronize
from penstock.data.loader import Batch
from penstock.models.attention import CausalRows, PackedRows
from penstock.models.decoder import Decoder
from penstock.models.quantized import packed_layers
from penstock.train.layers import compile_layers, run_layers
from penstock.train.update import Updater


def obstacle(updater: Updater) -> str:
    """Why nothing can be compiled here, or nothing."""
    if updater.pipeline and updater.recomputes:
        return "layers of a pipeline that are computed twice are not compiled"
    if next(packed_layers(updater.model), None) is not None:
        return "products with matrices that stay quantized are not compiled"
    if not can_compile(updater.device):
        return "there is no C++ compiler (g++ or clang++)" if updater.device.type == "cpu" else "Triton is missing"
    return ""


def eager_seconds(updater: Updater, batch: Batch, length: int) -> float:
    """How long the passes of an update take without compiling: those of a microbatch are timed, after others."""
    micros = list(updater.microbatches(batch, length))
    seconds = 0.0
    for micro, context in (micros[0],) * 2:
        synchronize(updater.device)
        began = time.monotonic()
        updater.rehearse(micro, context)
        synchronize(updater.device)
        seconds = time.monotonic() - began
    return seconds * len(micros)


def compile_loss(updater: Updater, batch: Batch, lengths: Set[int]) -> str:
    """Compiles the loss for every shape that the run will use, so that no step waits for it: the layers, once for all
    that are alike, and what is around them.

    Args:
        updater: whose loss it is; of a model in shards, its layers alone are compiled.
        batch: any.
        lengths: of the sequences that ``batch`` will be cut to.

    Returns:
        Why the run goes on without compiling, or nothing.
    """
    plain, device, model = updater.loss, updater.device, updater.model
    parts = updater.pipeline or updater.shards
    if parts:
        parts.compile()
    else:
        updater.loss = once_for_any_documents(plain)
        if isinstance(model, Decoder):
            compile_layers(model, updater.recomputes)
    try:
        for length in lengths:
            micro, _ = next(updater.microbatches(batch, length))
            contexts: list[CausalRows | PackedRows] = [PackedRows.of(micro.documents)]
            if device.type == "cuda":
                contexts.append(CausalRows.of(length, device))
            for context in contexts:
                updater.rehearse(micro, context)
    except RuntimeError as error:  # from PyTorch's compiler, which leans on tools outside it, such as C++ headers
        updater.loss = plain
        if parts:
            parts.use_eager()
        elif isinstance(model, Decoder):
            run_layers(model, updater.recomputes)
        return f"the compiler failed ({type(error).__name__})"
    finally:
        model.zero_grad()
        synchronize(device)
    return ""


def once_for_any_documents(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``loss``, compiled for each shape of a batch, but once for any number of documents."""
    import torch._dynamo

    fixed = torch.compile(loss, dynamic=False)

    def run(model: Decoder, batch: Batch, context: CausalRows | PackedRows) -> Tensor:
        if isinstance(context, PackedRows):
            # Where documents are short there are more boundaries: to compile anew takes longer than many a run.
            torch._dynamo.maybe_mark_dynamic(context.boundaries, 0)
        return fixed(model, batch, context)

    return run
