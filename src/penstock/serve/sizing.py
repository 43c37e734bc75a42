"""How many blocks the cache has, so that all that an engine takes of a device is its share of the memory."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch

from penstock.core.devices import DeviceMemory
from penstock.core.errors import PenstockError
from penstock.core.progress import Reporter, silent
from penstock.models.decoder import Decoder
from penstock.models.streamed import StreamedLayer, stream_of
from penstock.serve.config import EngineConfig
from penstock.serve.messages import described
from penstock.serve.rehearsal import rehearsal_blocks
from penstock.serve.run.runner import Runner

log = logging.getLogger(__name__)

#: Bytes that a CPU's cache has at most beside weights that are fewer, unless the configuration says otherwise.
LEAST_CPU_SHARE = 512 << 20

#: Of the bytes of its weights, what a model takes at most that was just loaded.
OWN = 1.1


class Meter(Protocol):
    """Measures a device's memory; see :class:`~penstock.core.devices.DeviceMemory`."""

    total: int

    def free(self) -> int: ...

    def peak(self, run: Callable[[], object]) -> int: ...


def settle_memory(
    runners: Sequence[Runner],
    config: EngineConfig,
    meter: Meter,
    compiled: bool,
    rehearse: Callable[[], object],
    report: Reporter = silent,
) -> None:
    """Gives the caches of ``runners`` as many blocks each as ``config.memory`` leaves beside weights, graphs, what the
    largest steps take at their peak, and whatever else is on the device; or those that the configuration names. Where
    they are ``compiled``, their graphs are captured. What goes where is in the ``memory`` of the first then, and in the
    log.

    The graphs are measured by some that are captured with a small cache, and the steps by a rehearsal with it.

    Args:
        runners: of the model, and of the one that drafts for it if there is one.
        rehearse: does the largest steps.

    Raises:
        PenstockError: there is no room for a cache.
    """
    first = runners[0]
    block = sum(each.block_bytes for each in runners)
    with report("measuring memory", 1 + compiled, "rehearsal") as bar:
        graphs = 0
        if compiled:
            graphs = sum(each.try_graphs(meter.free) for each in runners)
            bar.advance()
        before, small = meter.free(), first.cache.shape.blocks * block
        steps = meter.peak(rehearse)
        bar.advance()
    for each in runners:
        each.forget()
    if config.cache_tokens is None:
        room = before + small - steps - graphs - (1 - config.memory) * meter.total
        # One block is the runner's own.
        blocks = blocks_in(room, block, first.block_size, first.context) - 1
        for each in runners:
            each.resize(blocks)
    if compiled:
        left = meter.free()
        for each in runners:
            each.capture(report)
        graphs = max(graphs, left - meter.free())  # some are captured later
    if first.cache.shape.blocks * block >= small:
        # The allocator cuts small pieces out of large ones, but cannot join what it got one by one: if the largest come
        # first, no step takes more than they do.
        rehearse()
    weights = sum(weight_bytes(each.model) for each in runners)
    adapters = {"adapters": first.adapter_bytes} if first.adapter_bytes else {}
    taken = first.cache.shape.residual_bytes
    windows = {"windows": taken} if taken else {}
    first.memory = {
        "weights": weights,
        **adapters,
        **windows,
        "cache": first.cache.shape.blocks * block,
        "steps": steps,
        "graphs": graphs,
        # The driver's context, code, and fixed buffers; and other processes.
        "other": meter.total - before - small - weights - first.adapter_bytes - taken,
    }
    first.memory["left"] = meter.total - sum(first.memory.values())
    log.info("memory: %s", described(first.memory))


def let_go(device: torch.device, weights: int) -> None:
    """Has an engine that was there before let go of what it has on ``device``: it may hang in cycles, which are looked
    for where more is taken than so many bytes of ``weights``."""
    if torch.cuda.memory_allocated(device) > OWN * weights:
        gc.collect()


def weight_bytes(model: Decoder) -> int:
    """What the weights of ``model`` take; tied ones count once, and of layers on disk the buffers that they take turns
    in."""
    streamed = {name for name, each in model.named_modules() if isinstance(each, StreamedLayer)}
    stream, tensors = stream_of(model), dict[int, torch.Tensor]()
    for name, each in [*model.named_parameters(), *model.named_buffers()]:
        if ".".join(name.split(".", 2)[:2]) not in streamed:
            tensors[each.data_ptr()] = each
    return sum(each.nbytes for each in [*tensors.values(), *(stream.buffers if stream else ())])


def blocks_in(room: float, block_bytes: int, block_size: int, context: int) -> int:
    """How many blocks of ``block_bytes``, for ``block_size`` tokens each, fit into ``room`` bytes.

    Raises:
        PenstockError: too few for a sequence.
    """
    blocks = int(room // block_bytes)
    if blocks * block_size < min(context, 64):
        raise PenstockError(
            f"there is room for {max(blocks, 0)} blocks of {block_bytes / 2**20:.1f} MiB only",
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


def blocks_for(
    config: EngineConfig, device: torch.device, block_bytes: int, context: int, weights: int, windows: int = 0
) -> int:
    """How many blocks of so many bytes sequences of a ``context`` may have beside so many bytes of ``weights``, and of
    ``windows`` in full precision; on CUDA devices, while it is found out how many they can.

    A CPU shares its memory with everybody else on the machine: the cache there is no larger than the model, or than a
    small one may be, but has room for a sequence.

    Raises:
        PenstockError: there is room for too few for a sequence.
    """
    if config.cache_tokens is not None:
        return -(-config.cache_tokens // config.block_size)
    if device.type != "cuda":
        free = free_memory() / config.ranks  # which all ranks share
        sequence = -(-context // config.block_size) * block_bytes
        room = min(free * config.memory / 2, max(LEAST_CPU_SHARE, weights, sequence))
        if windows > room:
            raise PenstockError(
                f"windows in full precision take {windows / 2**30:.2f} GiB for {config.sequences} sequences, and the "
                f"cache may take {room / 2**30:.2f}",
                hint="Lower engine.sequences or engine.codec.residual, or raise engine.memory.",
            )
        return blocks_in(room - windows, block_bytes, config.block_size, context)
    # With fewer than are wanted, the largest steps are those that these allow.
    most = blocks_in(DeviceMemory(device).free() / 2, block_bytes, config.block_size, context)
    return min(rehearsal_blocks(config, device, context), most)


def require_room_aside(wanted: int) -> None:
    """Refuses to move more bytes to the host's memory than there is.

    Raises:
        PenstockError: fewer than are ``wanted`` are free.
    """
    if wanted > (free := free_memory()):
        raise PenstockError(
            f"a full pool of compressed caches has {wanted / 2**30:.1f} GiB in the host's memory, of which "
            f"{free / 2**30:.1f} GiB are free",
            hint="Lower engine.cache_tokens, or free memory.",
        )


def free_memory() -> int:
    """Bytes of main memory that are free for use."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
