"""FlashInfer's kernels, built before their first use: all at once, and with a bar that says how far they are.

FlashInfer keeps what it built by its own version and the device's architecture, and takes kernels that come built from
its package ``flashinfer-jit-cache`` where that is installed; here nothing is built that it has.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any

import torch

from penstock.core.errors import PenstockError
from penstock.core.progress import Reporter, silent
from penstock.ops.paged.contract import CacheShape

log = logging.getLogger(__name__)

#: Seconds between two looks at what is built.
LOOK = 0.5


def build_kernels(shape: CacheShape, report: Reporter = silent) -> None:
    """Builds the kernels that attention over a cache of this ``shape`` uses, those that are not there yet.

    Raises:
        PenstockError: one cannot be built.
    """
    try:
        missing = [spec for spec in _specs(shape) if not spec.is_compiled]
    except (ImportError, AttributeError, TypeError) as error:
        # These names are FlashInfer's own; in a version that has others, it builds at the first use, one by one.
        log.warning("FlashInfer's kernels are not built ahead, but at their first use: %s", error)
        return
    if not missing:
        return
    # Each is a library of several object files, and building a library is a process that makes several of them at once.
    objects = {path for spec in missing for path in spec.get_object_paths()}
    label = f"building {len(missing)} of FlashInfer's libraries, once on this machine"
    with report(label, len(objects), "kernel") as bar, ThreadPoolExecutor(len(missing)) as pool:
        builds: set[Future[None]] = {pool.submit(spec.build, verbose=False) for spec in missing}
        built = 0
        while builds:
            done, builds = wait_for(builds, LOOK)
            there = sum(path.exists() for path in objects)
            bar.advance(there - built)
            built = there
            for each in done:
                _check(each)


def kept_dtype(shape: CacheShape) -> torch.dtype:
    """The dtype of the numbers that kernels read from the cache's blocks."""
    return torch.float8_e4m3fn if shape.codec.policy_name == "fp8" else shape.dtype


def _specs(shape: CacheShape) -> list[Any]:
    """What FlashInfer builds the kernels from, those for batches with prompts and those for decodes."""
    from flashinfer.jit import gen_batch_decode_module, gen_batch_prefill_module
    from flashinfer.utils import determine_attention_backend

    dtype, kept, none = shape.dtype, kept_dtype(shape), 0  # positions are none of the kernel's business
    fastest = determine_attention_backend(shape.device, none, False, False, dtype, kept)
    common: dict[str, Any] = {
        "dtype_q": dtype,
        "dtype_kv": kept,
        "dtype_o": dtype,
        "dtype_idx": torch.int32,
        "head_dim_qk": shape.head_dim,
        "head_dim_vo": shape.head_dim,
        "pos_encoding_mode": none,
        "use_logits_soft_cap": False,
    }
    specs: list[Any] = []
    for sliding in sorted({window is not None for window in shape.windows}):
        own = {**common, "use_sliding_window": sliding}
        specs += [gen_batch_prefill_module(each, use_fp16_qk_reduction=False, **own) for each in {fastest, "fa2"}]
        if shape.heads == shape.kv_heads:
            specs.append(gen_batch_decode_module(**own))
    if shape.residual is not None:
        windows = {**common, "dtype_kv": dtype, "use_sliding_window": False}
        specs.append(gen_batch_prefill_module("fa2", use_fp16_qk_reduction=False, **windows))
    return specs


def _check(build: Future[None]) -> None:
    error = build.exception()
    if error is not None:
        # The end of what the compiler said has the reason.
        reason = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        complaint = next((line for line in reason if "error" in line.lower()), reason[-1])
        raise PenstockError(
            f"FlashInfer's kernels cannot be built: {complaint.strip()}",
            hint="It needs a CUDA toolkit with nvcc, and ninja; or install flashinfer-jit-cache, which has them built.",
        ) from error
