"""How many blocks the cache has, so that all that an engine takes of a device is its share of the memory."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from penstock.core.errors import PenstockError
from penstock.core.progress import Reporter, silent
from penstock.models.decoder import Decoder
from penstock.ops.paged.contract import CacheShape
from penstock.serve.config import EngineConfig
from penstock.serve.messages import described
from penstock.serve.rehearsal import rehearse_largest_steps
from penstock.serve.run.runner import Runner

log = logging.getLogger(__name__)


class Meter(Protocol):
    """Measures a device's memory; see :class:`~penstock.core.devices.DeviceMemory`."""

    total: int

    def free(self) -> int: ...

    def peak(self, run: Callable[[], object]) -> int: ...


def settle_memory(
    runner: Runner, config: EngineConfig, meter: Meter, compiled: bool, report: Reporter = silent
) -> None:
    """Gives the cache of ``runner`` the blocks that ``config.memory`` leaves beside weights, graphs, what the largest
    steps take at their peak, and whatever else is on the device; or those that the configuration names. Where the
    runner is ``compiled``, its graphs are captured. What goes where is in ``runner.memory`` then, and in the log.

    The graphs are measured by some that are captured with a small cache, and the steps by a rehearsal with it.

    Raises:
        PenstockError: there is no room for a cache.
    """
    cache = runner.cache
    with report("measuring memory", 1 + compiled, "rehearsal") as bar:
        graphs = 0
        if compiled:
            graphs = runner.try_graphs(meter.free)
            bar.advance()
        before, small = meter.free(), cache.shape.blocks * cache.shape.block_bytes
        steps = meter.peak(lambda: rehearse_largest_steps(config, runner))
        bar.advance()
    runner.forget()
    if config.cache_tokens is None:
        room = before + small - steps - graphs - (1 - config.memory) * meter.total
        # One block is the runner's own.
        runner.resize(blocks_in(room, cache.shape, runner.context) - 1)
    if compiled:
        left = meter.free()
        runner.capture(report)
        graphs = left - meter.free()
    weights = weight_bytes(runner.model)
    runner.memory = {
        "weights": weights,
        "cache": cache.shape.blocks * cache.shape.block_bytes,
        "steps": steps,
        "graphs": graphs,
        # The driver's context, code, and fixed buffers; and other processes.
        "other": meter.total - before - small - weights,
    }
    runner.memory["left"] = meter.total - sum(runner.memory.values())
    log.info("memory: %s", described(runner.memory))


def weight_bytes(model: Decoder) -> int:
    """What the weights of ``model`` take; tied ones count once."""
    tensors = {each.data_ptr(): each for each in [*model.parameters(), *model.buffers()]}
    return sum(each.numel() * each.element_size() for each in tensors.values())


def blocks_in(room: float, cache: CacheShape, context: int) -> int:
    """How many blocks of the ``cache`` fit into ``room`` bytes.

    Raises:
        PenstockError: too few for a sequence.
    """
    blocks = int(room // cache.block_bytes)
    if blocks * cache.block_size < min(context, 64):
        raise PenstockError(
            f"there is room for {max(blocks, 0)} blocks of {cache.block_bytes / 2**20:.1f} MiB only",
            hint="Free memory, raise engine.memory, lower engine.sequences or engine.tokens, which steps take memory "
            "by, or set engine.cache_tokens.",
        )
    return blocks


@contextlib.contextmanager
def explained_shortage() -> Iterator[None]:
    """Says that memory is short where PyTorch says that it has none left."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PenstockError(
            f"the device has too little memory for the model's largest steps: {str(error).splitlines()[0]}",
            hint="Free memory, or lower engine.sequences, engine.tokens or engine.context.",
        ) from error
