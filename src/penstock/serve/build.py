"""Makes an engine from a model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import weakref
from collections.abc import Callable
from collections.abc import Sequence as List
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from penstock.core.devices import DeviceMemory, can_compile, inference_dtype, pick
from penstock.core.errors import PenstockError, UsageError
from penstock.core.progress import Reporter, silent
from penstock.models import hub
from penstock.models.acceptance import folder as acceptance
from penstock.models.acceptance.head import AcceptanceHead
from penstock.models.adapters.slots import AdapterSlots, matrices, read
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.heads import folder as heads
from penstock.models.heads.contract import Continues, Continuing, Foresees, HeadModule, Prompts, Transfers
from penstock.models.invariant import make_invariant
from penstock.models.paged import cache_shape
from penstock.models.pairing import require_same_tokens
from penstock.models.shares import Share, divided
from penstock.models.streamed import stream_of
from penstock.models.tapped import TappedDecoder
from penstock.ops.paged.codecs.plain import Plain
from penstock.ops.paged.contract import CacheShape, PagedAttention, PagedCache
from penstock.ops.paged.invariant import Invariant
from penstock.parallel.tensor import join
from penstock.policy import index
from penstock.serve.calibration import learned_tables, pieces_of_text
from penstock.serve.choose.confidence import ConfidentBranchingSampler, ConfidentProposingSampler, ConfidentSampler
from penstock.serve.choose.grammar import Grammars
from penstock.serve.choose.invariant import InvariantSampler
from penstock.serve.choose.proposals import BranchingSampler, ProposingSampler
from penstock.serve.choose.sampler import Sampler
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.kv.compaction import Compactor
from penstock.serve.kv.disk import DiskBlocks, fingerprint
from penstock.serve.kv.host import HostBlocks
from penstock.serve.kv.moving import Mover
from penstock.serve.kv.policies.contract import CachePolicy
from penstock.serve.kv.tiers import Tiers
from penstock.serve.ranks.group import Ranks
from penstock.serve.ranks.runner import LastStageRunner, LeadingRunner, RankRunner, StageRunner
from penstock.serve.ranks.stages import StageDecoder, stages
from penstock.serve.rehearsal import rehearsal_blocks, rehearse_first_uses, rehearse_largest_steps
from penstock.serve.run.cascade import CascadeDraft, spare_blocks
from penstock.serve.run.chains import Chains
from penstock.serve.run.draft import ConfidentDraft, Drafting, DraftModel, DraftPlanner, PredictingDraft
from penstock.serve.run.graphs import prompt_shapes, window_shapes
from penstock.serve.run.heads import ContinuingDraft, ContinuingRunner, draft_with
from penstock.serve.run.planner import Planner
from penstock.serve.run.record import Recorder
from penstock.serve.run.runner import Runner, TappedRunner
from penstock.serve.run.trees import Trees
from penstock.serve.sizing import blocks_in, explained_shortage, settle_memory, weight_bytes
from penstock.speculate.contract import Drafter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = Plain()

#: Of adapters, where none says what rank they have.
DEFAULT_RANK = 16

#: Bytes that a CPU's cache has at most beside weights that are fewer, unless the configuration says otherwise.
LEAST_CPU_SHARE = 512 << 20


def open_engine(
    source: str | Path,
    config: EngineConfig,
    device: str = "auto",
    report: Reporter = silent,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Engine:
    """An engine for the model ``source`` (whatever ``hub.resolve`` takes) on ``device``. Its ``tokenizer`` is loaded
    where it is not given.

    Raises:
        PenstockError: the model cannot be had, or does not fit.
    """
    where = pick(device)
    folder = hub.resolve(source)
    tokenizer = tokenizer or hub.load_tokenizer(folder)
    if hub.read_config(folder).scalar_head:
        raise UsageError(
            f"{source} is a reward model, which gives a text a number and writes none",
            hint=f"Search with it: --scorer reward_model --scorer-option model={source}",
        )
    if config.ranks > 1:
        return _open_divided(source, folder, tokenizer, config, where, report)
    load = loader(config, where)
    model = load(folder).eval()
    draft: Decoder | HeadModule | None = None
    predictor: AcceptanceHead | None = None
    called = Path(source).name if folder.parent == hub.BOXED else str(source)
    if config.draft is not None and config.draft.model is not None:
        draft = load_draft(config.draft.model, folder, tokenizer, where, dtype_of(config, where), called)
        if config.controller.predicts:
            beside = hub.resolve(config.draft.model) / acceptance.BESIDE
            found = config.controller.predictions or beside
            predictor = acceptance.load(found, draft, model, (config.draft.model, called))
    elif config.draft is not None and config.draft.head is not None:
        draft = heads.load(config.draft.head, model, called)
    stop, grammars = _ends(folder, tokenizer, model.config.vocabulary)
    pieces = pieces_of_text(tokenizer, config.codec, model.config.context)
    engine = build_engine(model, config, stop, report, grammars, str(source), draft, pieces, predictor=predictor)
    if isinstance(engine.executor, Runner) and stream_of(model) is None:
        engine.executor.weights.source = lambda: load(folder).state_dict()
    return engine


def loader(config: EngineConfig, device: torch.device) -> Callable[[Path], Decoder]:
    """Loads a model from its folder as ``config`` has it on ``device``.

    Raises:
        UsageError: layers are to stay on disk, and the device has memory of its own.
    """
    dtype = dtype_of(config, device)
    if config.resident_weights is not None:
        if device.type != "cpu":
            raise UsageError(
                f"layers that stay on disk are read into the host's memory, and the device is {device}",
                hint="Serve with --device cpu, or leave out resident_weights.",
            )
        return functools.partial(hub.load_streamed, resident=config.resident_weights, dtype=dtype)
    # Kernels whose bits do not depend on the batch are for plain matrices.
    load = hub.load if config.deterministic else hub.load_for_inference
    return functools.partial(load, device=device, dtype=dtype)


def _ends(folder: Path, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> tuple[frozenset[int], Grammars | None]:
    """The tokens that end a text, and what compiles grammars, where the tokenizer can be used for it."""
    stop = hub.end_tokens(folder, tokenizer)
    return stop, Grammars(tokenizer, vocabulary, stop) if tokenizer.is_fast else None


def _open_divided(
    source: str | Path,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: EngineConfig,
    device: torch.device,
    report: Reporter,
) -> Engine:
    """An engine for the model in ``folder``, which is divided among ranks; this process is the first of them."""
    shape = hub.read_config(folder)
    # What cannot be divided is refused before anything starts.
    if config.pipeline_parallel > 1:
        stages(shape.layers, config.pipeline_parallel)
    else:
        divided(shape, config.tensor_parallel)
    stop, grammars = _ends(folder, tokenizer, shape.vocabulary)
    ranks = Ranks.start(config.ranks, str(folder), config.model_dump_json(), device)
    try:
        model = open_share(folder, config, device, ranks.share)
        ranks.meet()
        engine = build_engine(model, config, stop, report, grammars, str(source), ranks=ranks)
    except BaseException:
        ranks.close()
        raise
    weakref.finalize(engine.executor, ranks.close)  # for those who just drop it, or leave
    return engine


def open_share(folder: str | Path, config: EngineConfig, device: torch.device, share: Share) -> Decoder:
    """The ``share`` of the model in ``folder`` that a rank has on ``device``, or its stage; nothing else of it is read.

    Raises:
        PenstockError: the model cannot be had, or not be divided.
    """
    if config.pipeline_parallel > 1:
        part = functools.partial(StageDecoder, share=share)
        return hub.load_for_inference(folder, device=device, dtype=dtype_of(config, device), part=part).eval()
    model = hub.load_for_inference(folder, device=device, dtype=dtype_of(config, device), share=share).eval()
    return join(model, hub.read_config(Path(folder)), share)


def build_following(model: Decoder, config: EngineConfig, blocks: int) -> RankRunner:
    """A share of a model with its cache, for a rank that does what the first one does, which has chosen how many
    ``blocks`` sequences may use."""
    with explained_shortage():
        backend, shape = _opened(model, config, None, silent)
        memory = backend.open(dataclasses.replace(shape, blocks=blocks + 1))
        context = min(config.context or model.config.context, model.config.context)
        kind = {**_kinds(config, model, [memory], [False])[0], "adapters": _adapter_slots(model, model, config)}
        if isinstance(model, StageDecoder):
            kind |= {"stages": config.pipeline_parallel, "tokens_of_run": _tokens_of_run(config)}
            return StageRunner(model, memory, config.sequences, context, **kind)
        return RankRunner(model, memory, config.sequences, context, **kind)


def load_draft(
    source: str,
    target: Path,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    dtype: torch.dtype,
    name: str = "MODEL",
) -> Decoder:
    """The model ``source``, which drafts for the one in the folder ``target``, which is called ``name`` and whose
    tokenizer is given.

    Raises:
        PenstockError: it cannot be had, or does not speak the same tokens.
    """
    try:
        folder = hub.resolve(source)
    except UsageError as error:
        if not Path(source).is_dir():
            raise
        more = f"Or train a head that drafts for this model, and name its run: {heads.command(target=name)}"
        raise UsageError(error.what, hint=f"{error.hint} {more}") from error
    require_same_tokens(source, folder, target, tokenizer)
    return hub.load(folder, device=device, dtype=dtype).eval()


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
        engine = Engine(config, runner, stop, grammars, drafting, _tiers(model, config, runner.cache))
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
    device = _weight(model).device
    on_cuda = device.type == "cuda"
    # Compiled code chooses its kernels by the batch; and what stages send each other is in none.
    plain = config.deterministic or config.pipeline_parallel > 1
    compiled = config.compile and not plain and on_cuda and can_compile(device)
    models = [model]
    if isinstance(draft, Decoder) and config.draft is not None and config.draft.model is not None:
        models.append(draft)
    head = draft if isinstance(draft, HeadModule) else None
    if config.draft_tree and isinstance(head, Continues):
        raise UsageError(
            "this head goes on from its own hidden states and drafts a chain, no tree",
            hint="Leave draft_tree out, or draft with a model, a head of another kind, or ngram.",
        )
    if config.draft is not None and head is not None:
        _require_able(config.draft, head)
    if config.controller.predicts and models[1:] and predictor is None:
        raise UsageError(
            f"the controller {config.controller.policy_name!r} needs a head that predicts what is accepted",
            hint=f"Train one: {acceptance.command()}",
        )
    keeps = [isinstance(head, Foresees | Continues | Transfers), predictor is not None]
    if config.draft is not None and config.draft.meanwhile and on_cuda:
        raise UsageError(
            f"{config.draft.policy_name!r} drafts while layers are read from disk, which is for a CPU",
            hint="Draft with the same model, by its name, or serve with --device cpu.",
        )
    opened = [_opened(each, config, pieces, report) for each in models]
    if isinstance(head, Transfers):
        models[0] = TappedDecoder(model, head.layers)
    if isinstance(head, Prompts):
        models[0] = head.prompted(model)
    if isinstance(head, Continues):
        # What it has is little, and a codec would have to learn of it by other means than of a model.
        models.append(head.continuing(model))
        opened.append(_opened(models[-1], config.model_copy(update={"codec": Plain()}), None, report))
    contexts = [min(config.context or each.config.context, each.config.context) for each in models]
    block_bytes = sum(shape.block_bytes for _, shape in opened)
    for each, (_, shape), kept in zip(models, opened, keeps, strict=False):
        block_bytes += config.block_size * each.config.hidden * shape.dtype.itemsize if kept else 0
    # Elsewhere, what goes to the host's memory goes to that of the cache.
    aside = sum(shape.aside_bytes for _, shape in opened)
    weights = sum(map(weight_bytes, models))
    blocks = _blocks(config, device, block_bytes if on_cuda else block_bytes + aside, contexts[0], weights)
    runners: list[Runner] = []
    with explained_shortage():
        # One more than sequences use: the runner's own.
        counts = [blocks + 1, blocks + 1 + config.sequences * _spare(config)]
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
            if isinstance(each, Continuing):
                runners.append(ContinuingRunner(each, memory, config.sequences, context, target=runners[0], **kind))
            elif ranks is not None:
                leading: Callable[..., LeadingRunner] = LeadingRunner
                if isinstance(each, StageDecoder):
                    leading = functools.partial(LastStageRunner, tokens_of_run=_tokens_of_run(config))
                runners.append(leading(each, memory, config.sequences, context, ranks=ranks, **kind))
            else:
                made = TappedRunner if isinstance(each, TappedDecoder) else Runner
                runners.append(made(each, memory, config.sequences, context, **kind))
            if compiled:
                runners[-1].compile(config.budget(device), report)
        if on_cuda:

            def rehearse() -> None:
                rehearse_largest_steps(config, runners[0], _drafting(runners, config, head, predictor))

            settle_memory(runners, config, DeviceMemory(device), compiled, rehearse, report)
            _require_room_aside(aside * runners[0].cache.shape.blocks)
        else:
            cache = sum(count * each.block_bytes for count, each in zip(counts, runners, strict=False))
            runners[0].memory = {"weights": weights, "cache": cache}
            if runners[0].adapter_bytes:
                runners[0].memory["adapters"] = runners[0].adapter_bytes
            if memories[0].watch is not None:
                runners[0].memory["queries"] = memories[0].watch.bytes
            if aside:
                runners[0].memory["aside"] = (blocks + 1) * aside
        if ranks is not None:
            ranks.ask_memory()
        if compiled:
            rehearse_first_uses(Engine(config, runners[0], draft=_drafting(runners, config, head, predictor)))
    return runners[0], _drafting(runners, config, head, predictor)


def _tokens_of_run(config: EngineConfig) -> int | None:
    """How many drafted tokens of a sequence go through a pipeline in a run of their own; None where there are none."""
    return None if config.draft is None else config.draft.tokens_of_run


def _spare(config: EngineConfig) -> int:
    """How many blocks the model that drafts has for each slot beside those of sequences."""
    meanwhile = config.draft is not None and config.draft.meanwhile
    return spare_blocks(config.rows, config.block_size) if meanwhile else 0


def _require_able(drafter: Drafter, head: HeadModule) -> None:
    """Refuses a ``drafter`` that does not draft with this ``head``."""
    prompts = head.reach if isinstance(head, Prompts) else 0
    if bool(prompts) != bool(drafter.widths):
        raise UsageError(
            f"the drafter {drafter.policy_name!r} does not draft with a head of this kind",
            hint="Name the head's folder alone as the drafter, and the one that drafts with it is taken.",
        )
    if prompts < len(drafter.widths):
        raise UsageError(
            f"the head has {prompts} prompt tokens, and {len(drafter.widths)} tokens are to be drafted ahead",
            hint=f"Set draft.tokens={prompts}, or train a head with more: --set head.tokens={len(drafter.widths)}",
        )


def _blocks(config: EngineConfig, device: torch.device, block_bytes: int, context: int, weights: int) -> int:
    """How many blocks of so many bytes sequences of a ``context`` may have beside so many bytes of ``weights``; on CUDA
    devices, while it is found out how many they can.

    A CPU shares its memory with everybody else on the machine: the cache there is no larger than the model, or than a
    small one may be, but has room for a sequence.
    """
    if config.cache_tokens is not None:
        return -(-config.cache_tokens // config.block_size)
    if device.type != "cuda":
        free = _free_memory() / config.ranks  # which all ranks share
        sequence = -(-context // config.block_size) * block_bytes
        room = min(free * config.memory / 2, max(LEAST_CPU_SHARE, weights, sequence))
        return blocks_in(room, block_bytes, config.block_size, context)
    # With fewer than are wanted, the largest steps are those that these allow.
    most = blocks_in(DeviceMemory(device).free() / 2, block_bytes, config.block_size, context)
    return min(rehearsal_blocks(config, device, context), most)


def _require_room_aside(wanted: int) -> None:
    """Refuses to move more to the host's memory than there is."""
    if wanted > (free := _free_memory()):
        raise PenstockError(
            f"a full pool of compressed caches has {wanted / 2**30:.1f} GiB in the host's memory, of which "
            f"{free / 2**30:.1f} GiB are free",
            hint="Lower engine.cache_tokens, or free memory.",
        )


def _fitted(config: EngineConfig, model: DecoderConfig) -> CachePolicy:
    """The cache policy for a model."""
    context = min(config.context or model.context, model.context)
    return config.kv.fitted(model.model_copy(update={"context": context}))


def _kinds(config: EngineConfig, model: Decoder, memories: List[PagedCache], keeps: List[bool]) -> list[dict[str, Any]]:
    """How the runners of the ``model``, and of one that drafts where there is one, differ from a plain one; ``keeps``
    says whether they keep hidden states."""
    kinds: list[dict[str, Any]] = [{"window": config.rows - 1, "sampler": Sampler, "keeps_hidden": keeps[0]}]
    if config.deterministic:
        kinds[0]["sampler"] = InvariantSampler
    shape = memories[0].shape
    rows, kv = _most_rows(config, shape.device), _fitted(config, model.config)
    if (compactor := Compactor.of(memories[0], kv, config.sequences, rows, config.rows - 1)) is not None:
        watched = 0 if memories[0].watch is None else memories[0].watch.width
        kinds[0] |= {"compactor": compactor, "planner": functools.partial(Planner, watched=watched)}
    if kv.selection is not None:
        kinds[0]["planner"] = functools.partial(Planner, selects=True)
    if config.kv_reuse.moves:
        kinds[0]["mover"] = Mover(memories[0], model.config, model.rotary)
    if memories[1:]:
        kinds.append(
            {"window": 1, "keeps_hidden": keeps[1], **_drafting_kind(config)}
        )  # after a step that accepted all, it computes two tokens
    return kinds


def _most_rows(config: EngineConfig, device: torch.device) -> int:
    """Of a pass, also where a graph pads it."""
    sequences, budget = config.sequences, config.budget(device)
    shapes = [*prompt_shapes(sequences, budget), *window_shapes(sequences, config.rows - 1)]
    return max(budget, *(shape.rows for shape in shapes))


def _drafting(
    runners: List[Runner], config: EngineConfig, head: HeadModule | None, predictor: AcceptanceHead | None
) -> Drafting | None:
    """Who drafts: the second of ``runners``, with the ``predictor`` of what is accepted, or the ``head`` of the first;
    None where there is neither."""
    if runners[1:] and isinstance(runners[1], ContinuingRunner):
        return ContinuingDraft(runners[1], runners[0], config.verifier, config.budget(runners[1].device))
    if predictor is not None:
        return PredictingDraft(runners[1], config.verifier, config.budget(runners[1].device), predictor)
    growth = Trees() if config.draft_tree else Chains()
    if head is not None:
        return draft_with(head, runners[0], config.verifier, growth, config.sequences, **_drafting_kind(config))
    if not runners[1:]:
        return None
    given = runners[1], config.verifier, growth, config.budget(runners[1].device)
    if config.draft is not None and config.draft.meanwhile:
        return CascadeDraft(*given, slots=config.sequences, rows=config.rows)
    return (ConfidentDraft if config.controller.by_confidence else DraftModel)(*given)


def _drafting_kind(config: EngineConfig) -> dict[str, Any]:
    """How what a model or head drafts is chosen."""
    # By the draws of the target, where what is drafted has to be what it chooses; else by others, since a verifier
    # takes drafts for independent of its own draws.
    stream = "sample" if config.verifier.matches else "draft"
    told = config.controller.weighs or not config.verifier.matches
    planner = functools.partial(DraftPlanner, stream=stream)
    sure = config.controller.by_confidence
    sampler: Callable[..., Sampler] = ConfidentSampler if sure else Sampler
    if told:
        sampler = ConfidentProposingSampler if sure else ProposingSampler
    branches = config.draft_tree or (config.draft.widths if config.draft is not None else ())
    if branches:
        kind = ConfidentBranchingSampler if sure else BranchingSampler
        sampler = functools.partial(kind, branches=branches, verifier=config.verifier)
    return {"sampler": sampler, "planner": planner}


def _weight(model: Decoder) -> Tensor:
    """A weight of ``model``, or of a stage of one, on the device and in the dtype of all."""
    return model.embedding.weight if hasattr(model, "embedding") else next(model.parameters())


def _opened(
    model: Decoder, config: EngineConfig, pieces: Tensor | None, report: Reporter
) -> tuple[PagedAttention, CacheShape]:
    """What a cache for ``model`` is opened by, and its shape but for the number of blocks."""
    weight, shape = _weight(model), model.config
    model.expect(min(config.context or shape.context, shape.context))
    if config.deterministic:
        make_invariant(model)
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
    view = _fitted(config, shape).view
    if view is not None:
        if config.codec.policy_name not in ("plain", "bf16"):
            raise UsageError(
                f"the cache policy {config.kv.policy_name!r} keeps {view.holds}, and the codec "
                f"{config.codec.policy_name!r} would round them as if they were one vector",
                hint="Take the codec plain or bf16.",
            )
        cache = dataclasses.replace(cache, view=view, needs=cache.needs | {"view"})
    backend = _backend(config, cache)
    backend.prepare(cache, report)
    return backend, dataclasses.replace(cache, learned=learned_tables(model, config.codec, pieces, report))


def _backend(config: EngineConfig, cache: CacheShape) -> PagedAttention:
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


def _free_memory() -> int:
    """Bytes of main memory that are free for use."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
