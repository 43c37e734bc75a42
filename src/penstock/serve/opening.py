"""Opens an engine for a model that lies in a folder, or on a hub."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from penstock.core.devices import inference_dtype, pick
from penstock.core.errors import UsageError
from penstock.core.imports import importing
from penstock.core.progress import Reporter, silent
from penstock.models import hub
from penstock.models.acceptance import folder as acceptance
from penstock.models.acceptance.head import AcceptanceHead
from penstock.models.decoder import Decoder
from penstock.models.heads import folder as heads
from penstock.models.heads.contract import HeadModule
from penstock.models.pairing import require_same_tokens
from penstock.models.shares import Share
from penstock.models.streamed import stream_of
from penstock.parallel.tensor import join
from penstock.serve.build import build_engine, compiles
from penstock.serve.calibration import pieces_of_text
from penstock.serve.choose.grammar import Grammars
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.ranks.group import Ranks
from penstock.serve.ranks.stages import StageDecoder, stages
from penstock.serve.rehearsal import rehearse_drafts
from penstock.serve.run.runner import Runner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What compiling needs, whose import takes as long as reading a model of some billions of parameters.
COMPILER = ("torch._dynamo", "torch._inductor.compile_fx")


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
    if stream_of(model) is not None:
        return engine
    if isinstance(engine.executor, Runner):
        engine.executor.weights.source = lambda: load(folder).state_dict()
    rehearse_drafts(config, engine)
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

    def read(folder: Path) -> Decoder:
        with importing(*COMPILER if compiles(config, device) else ()):
            return load(folder, device=device, dtype=dtype)

    return read


def dtype_of(config: EngineConfig, device: torch.device) -> torch.dtype:
    """The dtype of weights and cache on ``device``."""
    named = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return named.get(config.dtype, inference_dtype(device))


def _ends(folder: Path, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> tuple[frozenset[int], Grammars | None]:
    """The tokens that end a text, and what compiles grammars, where the tokenizer can be used for it."""
    stop = hub.end_tokens(folder, tokenizer)
    return stop, Grammars(tokenizer, vocabulary, stop) if tokenizer.is_fast else None


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
        more = f"Or train a head that drafts for this model, and name its run: {heads.command(target=name)}"
        raise UsageError(error.what, hint=f"{error.hint} {more}") from error
    require_same_tokens(source, folder, target, tokenizer)
    return hub.load(folder, device=device, dtype=dtype).eval()


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
        hub.check_divisible(folder, config.tensor_parallel)
    stop, grammars = _ends(folder, tokenizer, shape.vocabulary)
    ranks = Ranks.start(config.ranks, str(folder), config.model_dump_json(), device)
    try:
        model = open_share(folder, config, device, ranks.share)
        ranks.meet()
        engine = build_engine(model, config, stop, report, grammars, str(source), ranks=ranks)
        rehearse_drafts(config, engine)
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
