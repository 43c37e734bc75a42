"""The configuration of a training run, one section a concern."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from penstock.core.config import Config
from penstock.data.corpora.contract import Corpus
from penstock.data.corpora.files import plain_name
from penstock.data.corpora.folder import kinds_by_suffix
from penstock.data.corpora.hf import was_saved
from penstock.data.corpora.records import Records
from penstock.data.samplers.contract import Sampler
from penstock.data.samplers.shuffle import Shuffle
from penstock.data.tokenizer import AUTO
from penstock.models.config import DecoderConfig
from penstock.models.heads.contract import Head
from penstock.pipeline.routes.contract import PipelineRoute
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.pipeline.schedules.one_f_one_b import OneForwardOneBackward
from penstock.pipeline.transforms.contract import PipelineTransform
from penstock.policy import Choice
from penstock.train.averages.contract import Average
from penstock.train.objectives.contract import Objective
from penstock.train.objectives.next_token import NextToken
from penstock.train.optim.adamw import AdamW
from penstock.train.optim.contract import Optimizer
from penstock.train.schedules.contract import Schedule
from penstock.train.schedules.linear import LinearDecay
from penstock.train.tuners.contract import Tuner
from penstock.train.tuners.full import Full

#: What a new token store has where the configuration leaves it open: tokens, and the share of documents held out.
VOCABULARY, HELD_OUT = 4096, 0.02


def _data_set(value: Any) -> Any:
    """A data set named by a path alone is read as its name says: a folder that ``save_to_disk`` wrote by ``hf``."""
    if not isinstance(value, str) or value == "none":
        return value
    kind = next((kind for suffix, kind in kinds_by_suffix().items() if plain_name(Path(value)).endswith(suffix)), None)
    if kind is None:
        kind = "hf" if was_saved(Path(value)) or not Path(value).exists() else "jsonl"
    return {"name": kind, "path": value}


def _of_records(value: Corpus) -> Records:
    if not isinstance(value, Records):
        raise ValueError(f"{value.policy_name} has texts, not records; name a JSON lines or Parquet file, say")
    return value


#: A data set of records: a path, or a table as of a corpus.
DataSet = Annotated[Corpus, Choice("data.corpus"), BeforeValidator(_data_set), AfterValidator(_of_records)]


class DataConfig(Config):
    """What is trained on.

    ``store`` is a token store; if it is None, or a path where none is yet, one is made (at ``store``, or in the run
    folder) from ``corpus`` (None: stdlib) with a new tokenizer of ``vocabulary`` tokens (None: 4,096), or with that of
    ``start_from``, and with the share ``held_out`` of the documents set aside (None: 0.02). ``begin_of_text`` and
    ``end_of_text`` are the special tokens around each document; ``auto`` is what the tokenizer puts before a text by
    itself (BOS, for some models), and its own end-of-text token; an empty ``begin_of_text`` is nothing. With
    ``skip_bad``, damaged documents are left out and counted, instead of ending the run. Where a store
    is there, what is said here must be true of it.

    ``chats`` are conversations, ``preferences`` are pairs of a chosen and a rejected answer, and ``ratings`` are
    answers that are good or bad, in place of ``corpus``, for the objectives that learn from them: a file, a folder that
    the library ``datasets`` has saved, or a table such as ``{ name = "hf", path = "org/name" }``. ``chat_template`` is
    a file whose template takes the place of the model's own, and ``new_tokens`` are special tokens of it
    that the model learns: tokenizer, embedding and head get them where they have none.
    """

    corpus: Annotated[Corpus, Choice("data.corpus", "stdlib")] | None = None
    store: Path | None = None
    vocabulary: PositiveInt | None = None
    held_out: float | None = Field(None, ge=0, lt=1)
    skip_bad: bool = False
    begin_of_text: str = AUTO
    end_of_text: str = Field(AUTO, min_length=1)
    chats: DataSet | None = None
    preferences: DataSet | None = None
    ratings: DataSet | None = None
    chat_template: Path | None = None
    new_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    sampler: Annotated[Sampler, Choice("data.sampler", "shuffle")] = Shuffle()


class Stage(Config):
    """A part of the run, ``share`` of its steps, with sequences of ``length`` tokens."""

    length: PositiveInt
    share: PositiveFloat = 1.0


class BatchConfig(Config):
    """How many tokens an update sees, and in which shape.

    ``tokens`` go into each update over all devices, ``micro_tokens`` through a device at a time (None: all of its
    share). ``stages`` follow one another; their shares are taken relative to their sum. Windows of the longest length
    are read, and cut for stages with shorter ones.
    """

    tokens: PositiveInt = 16384
    micro_tokens: PositiveInt | None = None
    stages: tuple[Stage, ...] = (Stage(length=512),)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if not self.stages:
            raise ValueError("at least one stage is needed")
        longest = self.length
        for stage in self.stages:
            if longest % stage.length:
                raise ValueError(f"the longest length {longest} must be a multiple of each stage's ({stage.length})")
        if self.tokens % longest:
            raise ValueError(f"tokens ({self.tokens}) must be a multiple of the longest length ({longest})")
        if self.micro_tokens is not None and (self.micro_tokens % longest or self.tokens % self.micro_tokens):
            raise ValueError(f"micro_tokens must be a multiple of {longest} and divide tokens ({self.tokens})")
        return self

    @property
    def length(self) -> int:
        """The longest sequence length."""
        return max(stage.length for stage in self.stages)

    def length_at(self, progress: float) -> int:
        """The sequence length at a ``progress`` between 0 and 1."""
        total = sum(stage.share for stage in self.stages)
        passed = 0.0
        for stage in self.stages:
            passed += stage.share / total
            if progress < passed:
                return stage.length
        return self.stages[-1].length


class ParallelConfig(Config):
    """How the processes share the work: in pipelines of ``pipeline`` devices each; several pipelines share a batch. Or
    ``shard`` of them, or all, hold the model together, each some rows of every parameter; several such groups share a
    batch, too. In the place of each process of these, ``tensor`` neighbours compute every layer together, each with
    some heads and some numbers of the feed-forward block.
    """

    pipeline: PositiveInt = 1
    shard: PositiveInt | Literal["all"] = 1
    tensor: PositiveInt = 1

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.pipeline > 1 and self.shard != 1:
            raise ValueError("a pipeline's stages are not sharded: give parallel.pipeline or parallel.shard, not both")
        if self.pipeline > 1 and self.tensor > 1:
            raise ValueError("a pipeline's layers are not divided: give parallel.pipeline or parallel.tensor, not both")
        return self


class PipelineConfig(Config):
    """How a pipeline works on the microbatches of a batch (``batch.micro_tokens`` each).

    ``transforms`` make a better schedule of it, one after another. A ``route`` sends microbatches on paths of their
    own, and orders them itself, in place of ``schedule``. Layers are cut into stages of equal counted work, over
    ``speeds`` of the devices (relative; in the order of their ranks) where they differ; or at ``cuts``, the first
    layers of all stages but the first; or as a ``partition`` says, a file of ``penstock pipeline partition``. With
    ``post_validation`` no stage waits for the whole gradient before it updates its weights: where that was wrong, it
    takes the update back in the next one. A process that does not answer for ``timeout`` seconds counts as lost.
    """

    schedule: Annotated[PipelineSchedule, Choice("pipeline.schedule", "1f1b")] = OneForwardOneBackward()
    route: Annotated[PipelineRoute, Choice("pipeline.route")] | None = None
    transforms: tuple[Annotated[PipelineTransform, Choice("pipeline.transform")], ...] = ()
    cuts: tuple[NonNegativeInt, ...] | None = None
    speeds: tuple[PositiveFloat, ...] | None = None
    partition: Path | None = None
    post_validation: bool = False
    timeout: PositiveFloat = 300.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [key for key in ("cuts", "speeds", "partition") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} each say where to cut: give one of them")
        if self.route is not None and self.schedule != OneForwardOneBackward():
            raise ValueError("a route orders the microbatches itself: give a route or a schedule, not both")
        return self


class ValidationConfig(Config):
    """Validation while a run is under way: after ``every`` so many updates (None: never), on held-out documents of
    ``tokens`` in all at most. With ``keep_best``, the checkpoint of the best weights so far stays.
    """

    every: PositiveInt | None = None
    tokens: PositiveInt = 262_144
    keep_best: bool = True


class TrainConfig(Config):
    """A training run.

    ``steps``, ``tokens``, ``epochs`` or ``minutes`` end it (the earliest; ``minutes`` counts time in steps and in
    compiling, and makes the schedule follow the clock). ``precision``: ``fp32``; ``autocast`` keeps fp32 weights and
    multiplies in bf16; ``bf16`` keeps all weights and activations in bf16 and updates fp32 masters; ``auto`` is
    ``bf16`` where that is faster on the device, else ``fp32``. ``compile``: with ``torch.compile``; ``auto`` does where
    a run is long enough to win back what that takes. ``chosen`` is written by the run: what became of each ``auto``,
    and why. ``start_from`` names a model whose weights and shape are the beginning, instead of ``model``; ``target``
    names one for which a ``head`` is trained, while it stays as it is, and ``draft`` one that drafts for it, where what
    is trained is for both.
    ``export_dtype`` is that of the finished model's weights;
    None is that of ``start_from``, or else the one of the training. Checkpoints keep the weights in full.

    ``tuner`` says which weights are trained, and ``rates`` multiplies the learning rate of parameters, by patterns of
    their names, of which the first that fits counts.

    ``evaluation_minutes`` is about how long the evaluation at the end may take: it takes a random part of the held-out
    documents then, if need be. The newest ``keep_checkpoints`` stay, and those of steps that ``keep_every`` divides;
    with ``checkpoint_background`` they are written from a copy in main memory while training goes on.
    ``on_bad_update`` says what becomes of an update whose loss or gradient is not finite, or, with ``spike``, whose
    gradient norm is more than so many times the typical one: it ends the run (``stop``; spikes are let pass), or is
    skipped and counted (``skip``). ``wandb`` is a project of W&B that the metrics are sent to.
    """

    seed: int = 0
    model: DecoderConfig | None = None
    start_from: str | None = None
    target: str | None = None
    head: Annotated[Head, Choice("model.head")] | None = None
    draft: str | None = None
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    objective: Annotated[Objective, Choice("train.objective", "next_token")] = NextToken()
    optim: Annotated[Optimizer, Choice("optim.optimizer", "adamw")] = AdamW()
    schedule: Annotated[Schedule, Choice("train.schedule", "linear")] = LinearDecay(warmup=0.05)
    validation: ValidationConfig = ValidationConfig()
    evaluation_minutes: PositiveFloat | None = None
    tuner: Annotated[Tuner, Choice("train.tuner", "full")] = Full()
    rates: dict[str, PositiveFloat] = Field({})
    average: Annotated[Average, Choice("train.average", "ema")] | None = None
    parallel: ParallelConfig = ParallelConfig()
    pipeline: PipelineConfig = PipelineConfig()
    steps: PositiveInt | None = None
    tokens: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    minutes: PositiveFloat | None = None
    clip: PositiveFloat | None = 1.0
    precision: Literal["auto", "fp32", "autocast", "bf16"] = "auto"
    export_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    compile: bool | Literal["auto"] = "auto"
    activation_checkpointing: bool = False
    device: str = "auto"
    checkpoint_minutes: PositiveFloat = 10.0
    checkpoint_steps: PositiveInt | None = None
    checkpoint_background: bool = False
    keep_checkpoints: PositiveInt = 2
    keep_every: PositiveInt | None = None
    on_bad_update: Literal["stop", "skip"] = "stop"
    spike: PositiveFloat | None = None
    wandb: str | None = None
    chosen: dict[str, str] = Field({})

    @model_validator(mode="before")
    @classmethod
    def _vocabulary_from_data(cls, tree: Any) -> Any:
        """The model's vocabulary is the data's unless it says otherwise."""
        if isinstance(tree, dict) and isinstance(tree.get("model"), dict) and "vocabulary" not in tree["model"]:
            data = tree.get("data", {})
            given = data if isinstance(data, dict) else {"vocabulary": getattr(data, "vocabulary", None)}
            vocabulary = given.get("vocabulary") or VOCABULARY
            return {**tree, "model": {**tree["model"], "vocabulary": vocabulary}}
        return tree

    @model_validator(mode="after")
    def _complete(self) -> Self:
        given = [key for key in ("model", "start_from", "target") if getattr(self, key) is not None]
        heads = self.objective.of_heads or self.objective.of_pairs
        if heads or self.target is not None or self.head is not None or self.draft is not None:
            self._head_complete()
        if not given:
            raise ValueError("say what to train: a [model] section, start_from, or a target for a head")
        if len(given) > 1:
            raise ValueError(f"give one of a [model] section, start_from and target, not {' and '.join(given)}")
        if (self.steps, self.tokens, self.epochs, self.minutes) == (None,) * 4:
            raise ValueError("say when to stop: steps, tokens, epochs or minutes")
        if self.data.new_tokens:
            self._new_tokens_possible()
        if self.objective.scalar and self.parallel.pipeline > 1:
            raise ValueError(f"the objective {self.objective.policy_name} trains without a pipeline")
        if (self.tuner != Full() or self.rates) and self.parallel.pipeline > 1:
            raise ValueError("a pipeline trains all weights at one rate: set parallel.pipeline=1 with tuner or rates")
        if not self.tuner.merges and self.parallel.shard != 1:
            raise ValueError(f"the tuner {self.tuner.policy_name} trains beside a whole model: set parallel.shard=1")
        if self.tuner.adds and self.start_from is None:
            raise ValueError(f"the tuner {self.tuner.policy_name} adds to a model that is there: set start_from")
        if self.pipeline.route is not None and self.parallel.pipeline == 1:
            raise ValueError(
                f"the route {self.pipeline.route.policy_name} leads through the stages of a pipeline, and "
                "parallel.pipeline is 1: set that to their number, or pipeline.route=none"
            )
        if self.parallel.tensor > 1:
            self._tensor_possible()
        learns, name = self.objective.learns_from, self.objective.policy_name
        for key in ("chats", "preferences", "ratings"):
            if getattr(self.data, key) is not None and key != learns:
                raise ValueError(f"data.{key} is given, and the objective {name} learns from {learns}: set objective")
        if self.model is not None and (self.data.vocabulary or 0) > self.model.vocabulary:
            raise ValueError(
                f"data.vocabulary ({self.data.vocabulary}) is larger than model.vocabulary ({self.model.vocabulary})"
            )
        if self.model is not None and self.batch.length > self.model.context:
            raise ValueError(
                f"sequences of {self.batch.length} tokens are longer than the model's context ({self.model.context})"
            )
        return self

    def _new_tokens_possible(self) -> None:
        if self.objective.learns_from == "texts":
            raise ValueError(f"data.new_tokens are those of conversations, and {self.objective.policy_name} reads none")
        if self.tuner.adds:
            raise ValueError(
                f"data.new_tokens have to be learnt by the embedding, which the tuner {self.tuner.policy_name} leaves "
                "as it is: set tuner=full"
            )
        if self.parallel != ParallelConfig():
            raise ValueError(
                "data.new_tokens are given to a model on one device: set parallel.pipeline=1, parallel.shard=1 and "
                "parallel.tensor=1"
            )

    def _tensor_possible(self) -> None:
        if not isinstance(self.tuner, Full):
            raise ValueError(
                f"the tuner {self.tuner.policy_name} adds to whole matrices, which parallel.tensor divides: set "
                "parallel.tensor=1"
            )
        if not self.optim.elementwise:
            raise ValueError(
                f"the optimizer {self.optim.policy_name} needs whole matrices, which parallel.tensor divides: set "
                "parallel.tensor=1, or optim=adamw"
            )
        if self.average is not None and not self.average.elementwise:
            raise ValueError(
                f"the average {self.average.policy_name} looks at all weights together, which parallel.tensor divides: "
                "set parallel.tensor=1, or average=ema"
            )

    def _head_complete(self) -> None:
        if self.target is None:
            raise ValueError("say which model the head is for: --set target=MODEL")
        if self.objective.of_pairs:
            if self.draft is None:
                raise ValueError("say which model drafts for the target: --set draft=DRAFT")
            if self.head is not None:
                raise ValueError(f"the objective {self.objective.policy_name!r} has a head of its own: leave head out")
        elif self.draft is not None:
            raise ValueError(f"the objective {self.objective.policy_name!r} knows of no draft: leave draft out")
        elif self.head is None:
            raise ValueError("say which head is trained: --set head=NAME")
        elif not self.objective.of_heads:
            raise ValueError(f"the objective {self.objective.policy_name!r} trains models, not heads")
        if self.tuner.adds:
            raise ValueError(f"a head is trained beside the model as it is: no tuner {self.tuner.policy_name!r}")
        if self.parallel.shard != 1 or self.parallel.tensor > 1:
            raise ValueError("a head is trained beside a whole model: set parallel.shard=1 and parallel.tensor=1")
        if self.parallel.pipeline > 1 or self.validation.every is not None:
            raise ValueError("a head is trained without a pipeline, and evaluated at the end: no validation.every")
