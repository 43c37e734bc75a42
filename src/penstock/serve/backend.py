"""Which attention backend opens the cache of a model."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from penstock.core.errors import PenstockError, UsageError
from penstock.core.progress import Reporter
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.invariant import make_invariant
from penstock.models.paged import cache_shape
from penstock.ops.paged.codecs.contract import LearnedCodec
from penstock.ops.paged.contract import CacheShape, PagedAttention
from penstock.ops.paged.invariant import Invariant
from penstock.policy import index
from penstock.serve.calibration import learned_tables
from penstock.serve.config import EngineConfig
from penstock.serve.kv.moving import Mover
from penstock.serve.kv.policies.contract import CachePolicy
from penstock.serve.ranks.stages import StageDecoder


def backend_of(
    model: Decoder, config: EngineConfig, pieces: Tensor | None, report: Reporter
) -> tuple[PagedAttention, CacheShape]:
    """What a cache for ``model`` is opened by, and its shape but for the number of blocks. Where ``config`` is
    deterministic, the model's layers are replaced. A codec that learns does so from ``pieces`` of text, int64 [P, T],
    or from random tokens where there are none.

    Raises:
        PenstockError: the model's attention does not go with what ``config`` wants, or no backend serves it.
    """
    weight, shape = model.like, model.config
    model.expect(min(config.context or shape.context, shape.context))
    held = model.held if isinstance(model, StageDecoder) else None
    cache = cache_shape(shape, config.block_size, weight.dtype, weight.device, config.codec, layers=held)
    if not config.kv.dense and (cache.needs or cache.windows != {None}):
        does = "evicts tokens" if config.kv.compresses else "leaves tokens unread"
        raise UsageError(
            f"the cache policy {config.kv.policy_name!r} {does}, and this model's attention counts them: "
            "it has windows, chunks, sinks, bounds on scores or latents",
            hint="Serve it with kv = full.",
        )
    if config.kv_reuse.moves:
        reason = Mover.refuses(shape)
        if reason is not None:
            raise UsageError(
                f"kv_reuse = {config.kv_reuse.policy_name} moves keys to other positions, and this model's cannot be "
                f"moved: {reason}",
                hint="Serve it with kv_reuse = prefix.",
            )
        cache = dataclasses.replace(cache, needs=cache.needs | {"weighed"})
    if config.kv_reuse.weighing is not None:
        if cache.needs or cache.windows != {None}:
            raise UsageError(
                f"kv_reuse = {config.kv_reuse.policy_name} lets texts see contexts that were encoded apart, and this "
                "model's attention cannot: it has windows, chunks, sinks, bounds on scores or latents",
                hint="Serve it with kv_reuse = prefix.",
            )
        cache = dataclasses.replace(cache, needs=cache.needs | {"contexts"})
    if (selection := config.kv.selection) is not None:
        cache = dataclasses.replace(cache, selection=selection, needs=cache.needs | {"selection"})
    view = fitted(config, shape).view
    if view is not None:
        if config.residual is not None:
            raise UsageError(
                f"codec.residual counts windows in places, and the cache policy {config.kv.policy_name!r} keeps "
                f"{view.holds}",
                hint="Leave codec.residual out.",
            )
        codec = config.codec
        if codec.policy_name not in ("plain", "bf16") and (isinstance(codec, LearnedCodec) or not view.plain):
            why = "has learned of each layer's own" if view.plain else "would round them as if they were one vector"
            raise UsageError(
                f"the cache policy {config.kv.policy_name!r} keeps {view.holds}, and the codec {codec.policy_name!r} "
                f"{why}",
                hint="Take the codec plain or bf16.",
            )
        cache = dataclasses.replace(cache, view=view, needs=cache.needs | {"view"})
    if (residual := config.residual) is not None:
        cache = dataclasses.replace(cache, residual=residual, needs=cache.needs | {"residual"})
    backend = _chosen(config, cache)
    if config.deterministic:  # now that nothing is refused: the model may be somebody's who goes on with it
        make_invariant(model)
    backend.prepare(cache, report)
    return backend, dataclasses.replace(cache, learned=learned_tables(model, config.codec, pieces, report))


def _chosen(config: EngineConfig, cache: CacheShape) -> PagedAttention:
    """The backend that the configuration names, or the best that serves the ``cache``.

    Raises:
        PenstockError: it does not, or none does.
    """
    reason = cache.codec.lacks(cache.head_dim)
    if reason is not None:
        raise UsageError(
            f"the codec {cache.codec.policy_name!r} cannot hold this model's keys and values: {reason}",
            hint="Change its options, or choose another engine.codec.",
        )
    named = Invariant() if config.deterministic else config.attention
    if named is not None:
        reason = named.refuses(cache)
        if reason is not None and config.deterministic:
            raise _not_deterministic(config, named.lacks(cache.needs), reason)
        if reason is not None:
            raise UsageError(f"the attention backend {named.policy_name!r} does not serve here: {reason}")
        return named
    backends = [entry.load()() for entry in index().entries("attention.paged")]
    known = [each for each in backends if isinstance(each, PagedAttention)]
    for backend in sorted(known, key=lambda each: each.rank, reverse=True):
        if backend.refuses(cache) is None:
            return backend
    raise PenstockError(
        f"no attention backend serves {cache.device} with {cache.dtype}, and reads blocks in {cache.codec.policy_name}"
    )


def _not_deterministic(config: EngineConfig, lacks: str | None, reason: str) -> UsageError:
    """The error where ``config`` is deterministic, and the attention for that does not serve for a ``reason``: perhaps
    since it ``lacks`` what other options want."""
    others = [f"kv = {config.kv.policy_name}"] if config.kv.compresses else []
    others += [] if config.kv_reuse.plain else [f"kv_reuse = {config.kv_reuse.policy_name}"]
    if lacks is not None and others:
        (what,) = others  # they exclude each other
        return UsageError(
            f"deterministic does not go together with {what}: attention whose bits do not depend on the batch is not "
            "there for it",
            hint=f"Leave out deterministic, or {what.partition(' ')[0]}.",
        )
    return UsageError(
        f"deterministic needs attention whose bits do not depend on the batch, and here there is none: {reason}",
        hint="Leave out deterministic.",
    )


def fitted(config: EngineConfig, model: DecoderConfig) -> CachePolicy:
    """The cache policy for a model."""
    context = min(config.context or model.context, model.context)
    return config.kv.fitted(model.model_copy(update={"context": context}))
