"""Makes an engine from a model."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path

import torch

from penstock.core.devices import DeviceMemory, can_compile, inference_dtype, pick
from penstock.core.errors import PenstockError, UsageError
from penstock.core.progress import Reporter, silent
from penstock.models import hub
from penstock.models.decoder import Decoder
from penstock.models.invariant import make_invariant
from penstock.ops.paged.contract import CacheShape, PagedAttention
from penstock.ops.paged.invariant import Invariant
from penstock.policy import index
from penstock.serve.choose.grammar import Grammars
from penstock.serve.choose.invariant import InvariantSampler
from penstock.serve.choose.sampler import Sampler
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.rehearsal import rehearsal_blocks, rehearse_first_uses
from penstock.serve.run.record import Recorder
from penstock.serve.run.runner import Runner
from penstock.serve.sizing import blocks_in, explained_shortage, settle_memory, weight_bytes

#: Tokens for which a CPU's cache has room at most, unless the configuration says otherwise.
MOST_CPU_TOKENS = 1 << 18


def open_engine(source: str | Path, config: EngineConfig, device: str = "auto", report: Reporter = silent) -> Engine:
    """An engine for the model ``source`` (whatever ``hub.resolve`` takes) on ``device``.

    Raises:
        PenstockError: the model cannot be had, or does not fit.
    """
    where = pick(device)
    folder = hub.resolve(source)
    # Kernels whose bits do not depend on the batch are for plain matrices.
    load = hub.load if config.deterministic else hub.load_for_inference
    model = load(folder, device=where, dtype=dtype_of(config, where)).eval()
    tokenizer = hub.load_tokenizer(folder)
    stop = hub.end_tokens(folder, tokenizer)
    grammars = Grammars(tokenizer, model.config.vocabulary, stop) if tokenizer.is_fast else None
    return build_engine(model, config, stop, report, grammars, str(source))


def dtype_of(config: EngineConfig, device: torch.device) -> torch.dtype:
    """The dtype of weights and cache on ``device``."""
    named = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return named.get(config.dtype, inference_dtype(device))


def build_engine(
    model: Decoder,
    config: EngineConfig,
    stop: frozenset[int] = frozenset(),
    report: Reporter = silent,
    grammars: Grammars | None = None,
    source: str = "",
) -> Engine:
    """An engine for ``model`` where it lies, in its own dtype. ``source`` is where it came from, for a recording.

    Raises:
        PenstockError: there is no room for a cache, or no attention backend for the device and dtype.
    """
    runner = build_runner(model, config, report)
    if config.record is None:
        return Engine(config, runner, stop, grammars)
    options = {**config.model_dump(mode="json"), "record": None, "cache_tokens": runner.blocks * runner.block_size}
    header = {"model": model.config.model_dump(mode="json"), "source": source, "engine": options}
    return Engine(config, Recorder(runner, config.record, header), stop, grammars)


def build_runner(model: Decoder, config: EngineConfig, report: Reporter = silent) -> Runner:
    """The model with its cache, warmed up. Where ``config`` is deterministic, the model's layers are replaced.

    Raises:
        PenstockError: there is no room for a cache, or no attention backend for the device and dtype.
    """
    weight, shape = model.embedding.weight, model.config
    context = min(config.context or shape.context, shape.context)
    if config.deterministic:
        make_invariant(model)
    named = Invariant() if config.deterministic else config.attention
    backend = named or _best(weight.device, weight.dtype, shape.head_dim)
    reason = backend.serves(weight.device, weight.dtype, shape.head_dim)
    if reason is not None:
        raise UsageError(f"the attention backend {backend.policy_name!r} does not serve here: {reason}")
    cache = CacheShape(
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        blocks=1,
        block_size=config.block_size,
        dtype=weight.dtype,
        device=weight.device,
        windows=frozenset(shape.window_of(layer) for layer in range(shape.layers)),
    )
    backend.prepare(cache, report)
    on_cuda = weight.device.type == "cuda"
    if config.cache_tokens is not None:
        blocks = -(-config.cache_tokens // config.block_size)
    else:
        blocks = _rehearsal_blocks(config, cache, context) if on_cuda else _cpu_blocks(config, cache, context)
    sampler = InvariantSampler if config.deterministic else Sampler
    with explained_shortage():
        # One more than sequences use: the runner's own.
        memory = backend.open(dataclasses.replace(cache, blocks=blocks + 1))
        runner = Runner(model, memory, config.sequences, context, config.rows - 1, sampler)
        # Compiled code chooses its kernels by the batch.
        compiled = config.compile and not config.deterministic and on_cuda and can_compile(weight.device)
        if compiled:
            runner.compile(config.budget(weight.device), report)
        if on_cuda:
            settle_memory(runner, config, DeviceMemory(weight.device), compiled, report)
        else:
            runner.memory = {"weights": weight_bytes(model), "cache": (blocks + 1) * cache.block_bytes}
        if compiled:
            rehearse_first_uses(Engine(config, runner))
    return runner


def _best(device: torch.device, dtype: torch.dtype, head_dim: int) -> PagedAttention:
    backends = [entry.load()() for entry in index().entries("attention.paged")]
    known = [each for each in backends if isinstance(each, PagedAttention)]
    for backend in sorted(known, key=lambda each: each.rank, reverse=True):
        if backend.serves(device, dtype, head_dim) is None:
            return backend
    raise PenstockError(f"no attention backend serves {device} with {dtype}")


def _rehearsal_blocks(config: EngineConfig, cache: CacheShape, context: int) -> int:
    """How many blocks the cache has while it is found out how many it can have; with fewer than are wanted, the largest
    steps are those that these allow."""
    room = DeviceMemory(cache.device).free() / 2
    return min(rehearsal_blocks(config, cache.device, context), blocks_in(room, cache, context))


def _cpu_blocks(config: EngineConfig, cache: CacheShape, context: int) -> int:
    """How many blocks the cache has in main memory."""
    room = min(_free_memory() * config.memory / 2, MOST_CPU_TOKENS * cache.block_bytes / cache.block_size)
    return blocks_in(room, cache, context)


def _free_memory() -> int:
    """Bytes of main memory that are free for use."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
