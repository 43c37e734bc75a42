"""Makes an engine from a model."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from collections.abc import Sequence as List
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.core.devices import DeviceMemory, can_compile
from penstock.core.errors import UsageError
from penstock.core.progress import Reporter, silent
from penstock.models import hub
from penstock.models.acceptance.head import AcceptanceHead
from penstock.models.adapters.slots import AdapterSlots, matrices, read
from penstock.models.decoder import Decoder
from penstock.models.heads.contract import Continues, Continuing, Foresees, HeadModule, Prompts, Transfers
from penstock.models.prompted import PromptedDecoder
from penstock.models.quantized import QuantizedLinear
from penstock.models.tapped import TappedDecoder
from penstock.ops import calls, invariant, logprobs, low_rank, native, rowwise
from penstock.ops.paged import cpu as attention
from penstock.ops.paged.codecs.plain import Plain
from penstock.ops.paged.contract import PagedCache
from penstock.ops.quantized import cpu as quantized
from penstock.serve.backend import backend_of, fitted
from penstock.serve.choose.grammar import Grammars
from penstock.serve.choose.invariant import InvariantSampler
from penstock.serve.choose.sampler import Sampler
from penstock.serve.config import EngineConfig
from penstock.serve.drafting import check_drafting, drafting_kind, drafting_of, spare, tokens_of_run
from penstock.serve.engine.engine import Engine
from penstock.serve.kv.compaction import Compactor
from penstock.serve.kv.disk import DiskBlocks, fingerprint
from penstock.serve.kv.host import HostBlocks
from penstock.serve.kv.moving import Mover
from penstock.serve.kv.tiers import Tiers
from penstock.serve.ranks.group import Ranks
from penstock.serve.ranks.runner import LastStageRunner, LeadingRunner, RankRunner, StageRunner
from penstock.serve.ranks.stages import StageDecoder
from penstock.serve.rehearsal import rehearse_first_uses, rehearse_largest_steps, rehearse_prompts
from penstock.serve.run.draft import Drafting
from penstock.serve.run.graphs import prompt_shapes, window_shapes
from penstock.serve.run.heads import ContinuingRunner
from penstock.serve.run.passes import Passes, TappedPasses
from penstock.serve.run.planner import Planner
from penstock.serve.run.record import Recorder
from penstock.serve.run.runner import Runner
from penstock.serve.sizing import (
    blocks_for,
    explained_shortage,
    let_go,
    require_room_aside,
    settle_memory,
    weight_bytes,
)
from penstock.speculate.contract import Drafter

#: Of adapters, where none says what rank they have.
DEFAULT_RANK = 16


def build_engine(
    model: Decoder,
    config: EngineConfig,
    stop: frozenset[int] = frozenset(),
    report: Reporter = silent,
    grammars: Grammars | None = None,
    source: str = "",
    draft: Decoder | HeadModule | None = None,
    pieces: Tensor | None = None,
    ranks: Ranks | None = None,
    predictor: AcceptanceHead | None = None,
) -> Engine:
    """An engine for ``model`` where it lies, in its own dtype. ``source`` is where it came from, for a recording, and
    ``draft`` the model or head that drafts, where ``config`` has such a drafter; ``predictor`` says what is accepted of
    it, where the controller asks. A codec of the cache that learns does so from ``pieces`` of text, int64 [P, T], or
    from random tokens where there are none. Where ``ranks`` are given, ``model`` is the first one's share, and they
    have the others.

    Raises:
        PenstockError: there is no room for a cache, or no attention backend for the device and dtype.
    """
    runner, drafting = build_runners(model, config, draft, report, pieces, ranks, predictor)
    if config.record is None:
        tiers = _tiers(model, config, runner.cache)
        engine = Engine(config, runner, stop, grammars, drafting, tiers)
        # Before the first request it is known what is sooner computed than read. A CPU would take long to tell, and
        # computes a block in more time than a disk needs for its few bytes.
        if tiers is not None and tiers.disk_bytes and runner.device.type == "cuda":
            engine.steps.prompts = rehearse_prompts(config, runner)
        for name, folder in config.adapters.items():
            engine.adapters.load(name, folder)
        return engine
    options = {**config.model_dump(mode="json"), "record": None, "cache_tokens": runner.blocks * runner.block_size}
    header = {"model": model.config.model_dump(mode="json"), "source": source, "engine": options}
    return Engine(config, Recorder(runner, config.record, header), stop, grammars, drafting)


def _tiers(model: Decoder, config: EngineConfig, cache: PagedCache) -> Tiers | None:
    """Where blocks go that leave ``cache``.

    Raises:
        UsageError: not one of them fits, or the folder cannot be used.
    """
    if not config.kv_host:
        return None
    shape = cache.shape
    places = config.kv_host // shape.block_bytes
    if not places:
        raise UsageError(
            f"kv_host is {config.kv_host:,} bytes, and a block of the cache has {shape.block_bytes:,}",
            hint="Give the host's memory more, or leave the option out.",
        )
    learned = None if shape.learned is None else hashlib.blake2b(shape.learned.cpu().numpy().tobytes()).hexdigest()
    differing = (shape.dtype, shape.block_size, type(cache).__name__, shape.codec.describe(), learned)
    space = functools.partial(fingerprint, model, *differing)
    disk = None if config.kv_disk is None else DiskBlocks(config.kv_disk, space(), config.kv_disk_size)
    with explained_shortage():
        return Tiers(HostBlocks(cache, places), disk, space=space)


def compiles(config: EngineConfig, device: torch.device) -> bool:
    """Whether passes on ``device`` are compiled, and steps are graphs, where the model's attention can be."""
    # Compiled code chooses its kernels by the batch; and what stages send each other is in none.
    plain = config.deterministic or config.pipeline_parallel > 1
    return config.compile and not plain and device.type == "cuda" and can_compile(device)


def build_runner(
    model: Decoder, config: EngineConfig, report: Reporter = silent, pieces: Tensor | None = None
) -> Runner:
    """The model with its cache, warmed up, without one that drafts; see :func:`build_runners`."""
    return build_runners(model, config, None, report, pieces)[0]


def build_runners(
    model: Decoder,
    config: EngineConfig,
    draft: Decoder | HeadModule | None = None,
    report: Reporter = silent,
    pieces: Tensor | None = None,
    ranks: Ranks | None = None,
    predictor: AcceptanceHead | None = None,
) -> tuple[Runner, Drafting | None]:
    """The model with its cache, warmed up, and likewise the one that drafts, with as many blocks; a head drafts with
    those of the model. Where ``config`` is deterministic, the models' layers are replaced. ``pieces``, ``ranks`` and
    ``predictor`` as of :func:`build_engine`.

    Raises:
        PenstockError: there is no room for a cache, or no attention backend for the device and dtype.
    """
    device = model.like.device
    on_cuda = device.type == "cuda"
    check_drafting(config, draft, predictor, device)
    compiled = compiles(config, device)
    if device.type == "cpu":
        native.build(_kernels(model, config), report)
    models = [model]
    if isinstance(draft, Decoder) and config.draft is not None and config.draft.model is not None:
        models.append(_drafting_model(draft, config.draft, config.sequences))
    head = draft if isinstance(draft, HeadModule) else None
    keeps = [isinstance(head, Foresees | Continues | Transfers), predictor is not None]
    opened = [backend_of(each, config, pieces, report) for each in models]
    if isinstance(head, Transfers):
        models[0] = TappedDecoder(model, head.layers)
    if isinstance(head, Prompts):
        models[0] = head.prompted(model)
    if isinstance(head, Continues):
        # What it has is little, and a codec would have to learn of it by other means than of a model.
        models.append(head.continuing(model))
        opened.append(backend_of(models[-1], config.model_copy(update={"codec": Plain()}), None, report))
    contexts = [min(config.context or each.config.context, each.config.context) for each in models]
    block_bytes = sum(shape.block_bytes for _, shape in opened)
    for each, (_, shape), kept in zip(models, opened, keeps, strict=False):
        block_bytes += config.block_size * each.config.hidden * shape.dtype.itemsize if kept else 0
    # Elsewhere, what goes to the host's memory goes to that of the cache.
    aside = sum(shape.aside_bytes for _, shape in opened)
    weights = sum(map(weight_bytes, models))
    windows = sum(shape.residual_bytes for _, shape in opened)
    each_block = block_bytes if on_cuda else block_bytes + aside
    if on_cuda:
        let_go(device, weights)
    blocks = blocks_for(config, device, each_block, contexts[0], weights, windows)
    runners: list[Runner] = []
    with explained_shortage():
        # One more than sequences use: the runner's own.
        counts = [blocks + 1, blocks + 1 + config.sequences * spare(config)]
        memories = [
            backend.open(dataclasses.replace(shape, blocks=count))
            for (backend, shape), count in zip(opened, counts, strict=False)
        ]
        kinds = _kinds(config, model, memories, keeps)
        kinds[0]["adapters"] = _adapter_slots(model, models[0], config)
        kinds[0]["probes"] = len(config.draft.widths) if config.draft is not None else 0
        # There are no graphs with a plain backend that was taken since no other knows the model's attention.
        compiled = compiled and (config.attention is not None or all(memory.fix([], 0) for memory in memories))
        for each, memory, context, kind in zip(models, memories, contexts, kinds, strict=True):
            runners.append(_runner(each, memory, config, context, kind, runners, ranks))
            if compiled:
                runners[-1].compile(config.budget(device), report)
        if on_cuda:

            def rehearse() -> None:
                rehearse_largest_steps(config, runners[0], drafting_of(runners, config, head, predictor))

            settle_memory(runners, config, DeviceMemory(device), compiled, rehearse, report)
            require_room_aside(aside * runners[0].cache.shape.blocks)
        else:
            cache = sum(count * each.block_bytes for count, each in zip(counts, runners, strict=False))
            _note_memory(runners[0], weights, cache, (blocks + 1) * aside)
        if ranks is not None:
            ranks.ask_memory()
        if compiled:
            rehearse_first_uses(config, runners[0], drafting_of(runners, config, head, predictor))
    return runners[0], drafting_of(runners, config, head, predictor)


def _kernels(model: Decoder, config: EngineConfig) -> list[Path]:
    """What steps with ``model`` use of native kernels, on a CPU."""
    found = [attention.SOURCE, invariant.SOURCE, rowwise.SOURCE, logprobs.SOURCE, calls.SOURCE]
    if any(isinstance(each, QuantizedLinear) for each in model.modules()):
        found.append(quantized.SOURCE)
    return [*found, low_rank.SOURCE] if config.adapters else found


def _drafting_model(draft: Decoder, drafter: Drafter, slots: int) -> Decoder:
    """``draft`` as ``drafter`` has it draft for sequences in so many ``slots``."""
    if not drafter.superposes:
        return draft
    return PromptedDecoder(draft, draft.like.new_zeros(slots, draft.config.hidden))


def _runner(
    model: Decoder | Continuing,
    memory: PagedCache,
    config: EngineConfig,
    context: int,
    kind: dict[str, Any],
    before: List[Runner],
    ranks: Ranks | None,
) -> Runner:
    """The runner of ``model`` with its ``memory``; of one that goes on from another, whose runner came ``before``."""
    if isinstance(model, Continuing):
        return ContinuingRunner(model, memory, config.sequences, context, target=before[0], **kind)
    if ranks is not None:
        leading: Callable[..., LeadingRunner] = LeadingRunner
        if isinstance(model, StageDecoder):
            leading = functools.partial(LastStageRunner, tokens_of_run=tokens_of_run(config))
        return leading(model, memory, config.sequences, context, ranks=ranks, **kind)
    if isinstance(model, TappedDecoder):
        kind = {**kind, "passes": TappedPasses}
    return Runner(model, memory, config.sequences, context, **kind)


def _note_memory(first: Runner, weights: int, cache: int, aside: int) -> None:
    """Notes in the ``first`` runner what the models' weights and caches take of a CPU's memory, in bytes."""
    first.memory = {"weights": weights, "cache": cache}
    if first.adapter_bytes:
        first.memory["adapters"] = first.adapter_bytes
    if windows := first.cache.shape.residual_bytes:
        first.memory["windows"] = windows
    if first.cache.watch is not None:
        first.memory["queries"] = first.cache.watch.bytes
    if aside:
        first.memory["aside"] = aside


def build_following(model: Decoder, config: EngineConfig, blocks: int) -> RankRunner:
    """A share of a model with its cache, for a rank that does what the first one does, which has chosen how many
    ``blocks`` sequences may use."""
    with explained_shortage():
        backend, shape = backend_of(model, config, None, silent)
        memory = backend.open(dataclasses.replace(shape, blocks=blocks + 1))
        context = min(config.context or model.config.context, model.config.context)
        kind = {**_kinds(config, model, [memory], [False])[0], "adapters": _adapter_slots(model, model, config)}
        if isinstance(model, StageDecoder):
            kind |= {"stages": config.pipeline_parallel, "tokens_of_run": tokens_of_run(config)}
            return StageRunner(model, memory, config.sequences, context, **kind)
        return RankRunner(model, memory, config.sequences, context, **kind)


def _kinds(config: EngineConfig, model: Decoder, memories: List[PagedCache], keeps: List[bool]) -> list[dict[str, Any]]:
    """How the runners of the ``model``, and of one that drafts where there is one, differ from a plain one; ``keeps``
    says whether they keep hidden states."""
    trees = bool(config.tree or (config.draft is not None and config.draft.widths))
    kinds: list[dict[str, Any]] = [
        {"window": config.rows - 1, "trees": trees, "sampler": Sampler, "keeps_hidden": keeps[0]}
    ]
    if config.deterministic:
        kinds[0]["sampler"] = InvariantSampler
    shape = memories[0].shape
    rows, kv = _most_rows(config, shape.device), fitted(config, model.config)
    if (compactor := Compactor.of(memories[0], kv, config.sequences, rows, config.rows - 1)) is not None:
        watched = 0 if memories[0].watch is None else memories[0].watch.width
        kinds[0] |= {"compactor": compactor, "planner": functools.partial(Planner, watched=watched)}
    if kv.selection is not None:
        kinds[0]["planner"] = functools.partial(Planner, selects=True)
    if shape.residual is not None:
        kinds[0]["planner"] = functools.partial(kinds[0].get("planner", Planner), windows=True)
    if config.kv_reuse.moves:
        kinds[0]["mover"] = Mover(memories[0], model.config, model.rotary)
    if memories[1:]:
        # After a step that accepted all, it computes two tokens; of a tree, all but the last generation; and what was
        # superposed is in the cache of none of the texts.
        superposes = config.draft is not None and config.draft.superposes > 0
        window = config.rows - 1 if superposes else max(1, config.rows - 3) if trees else 1
        drafts: dict[str, Any] = {"window": window, "trees": trees and not superposes, "keeps_hidden": keeps[1]}
        # Prompts are computed where the drafting is timed.
        drafts["passes"] = functools.partial(Passes, waits=False)
        kind = drafting_kind(config)
        if config.draft is not None and config.draft.model is not None and kind["sampler"] is Sampler:
            # Nobody asks by what its tokens were drawn, so that all can be drafted at once; behind one that was
            # accepted last, and is not in its cache yet.
            drafts["onward"] = 0 if keeps[1] else config.draft.most + 1
        kinds.append({**drafts, **kind})
    return kinds


def _most_rows(config: EngineConfig, device: torch.device) -> int:
    """Of a pass, also where a graph pads it."""
    sequences, budget = config.sequences, config.budget(device)
    shapes = [*prompt_shapes(sequences, budget), *window_shapes(sequences, config.rows - 1, budget)]
    return max(budget, *(shape.rows for shape in shapes))


def _adapter_slots(model: Decoder, through: Decoder, config: EngineConfig) -> AdapterSlots | None:
    """Room for adapters of ``model``, where ``config`` wants some. Tokens go ``through`` it, or one of its layers.

    Raises:
        PenstockError: one of those that it names cannot be had, or it names a matrix that the model does not have.
    """
    if not config.room_for_adapters:
        return None
    family = hub.family_of(model)
    folders = {hub.resolve_adapter(folder) for folder in config.adapters.values()}
    given = {folder: read(folder, family, model) for folder in folders}
    rank = max((len(each.a) for additions in given.values() for each in additions.values()), default=DEFAULT_RANK)
    found = {name.removesuffix(".weight") for additions in given.values() for name in additions}
    targets = config.adapter_targets or {each.rpartition(".")[2] for each in found & matrices(model, family).keys()}
    rank = config.adapter_rank or rank
    return AdapterSlots(through, family, config.room_for_adapters, rank, sorted(targets), given)
