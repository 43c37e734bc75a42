"""A run folder: what a training run reads and leaves.

``run.json`` is the complete configuration; ``store/`` the token store, unless the configuration names another;
``tokenizer/`` what goes beside the weights into every model folder that the run writes;
``metrics.jsonl`` a record for each update; ``checkpoints/`` the newest checkpoints; ``model/`` the finished model, a
Hugging Face folder; ``adapter/`` what was added to its base, where that alone was trained; ``reference/`` what the
model at the beginning found probable, and ``teacher/`` what a teacher says, where the objective asks; ``loss.png`` the
loss curve; ``summary.json`` what came out. A pipeline adds ``pipeline.json``, what its stages cost, and
``pipeline-trace.json``, the timeline of an update, measured and simulated.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from penstock.core.config import apply_overrides, build, overridden
from penstock.core.devices import pick
from penstock.core.errors import ConfigError, UsageError
from penstock.core.files import atomic_folder, read_json, write_json
from penstock.core.progress import Reporter, silent
from penstock.models import hub
from penstock.models.acceptance.head import Pair
from penstock.models.adapters.peft import Adapter
from penstock.models.adapters.routed import routed
from penstock.models.beside import Beside
from penstock.models.blank import assembled, without_weights
from penstock.models.companions import copy_companions
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.heads.headed import Headed
from penstock.models.pairing import require_same_tokens
from penstock.models.quantized import packed_layers
from penstock.parallel.world import World
from penstock.train import checkpoint, folders
from penstock.train.batches import rows_of_each
from penstock.train.config import TrainConfig
from penstock.train.folders import Exported, Trained
from penstock.train.length import unfinished_warmup
from penstock.train.loop import Trainer
from penstock.train.machine import fast_precision
from penstock.train.material import store
from penstock.train.material.contract import Material
from penstock.train.material.dialogues import REFERENCE, Dialogues
from penstock.train.material.texts import Texts
from penstock.train.pipeline import recovery
from penstock.train.pipeline.pipeline import Pipeline
from penstock.train.precision import Precision
from penstock.train.resuming import resume_command
from penstock.train.shards.shards import Shards
from penstock.train.validation import Validation

CONFIG, SUMMARY = "run.json", "summary.json"
CHECKPOINTS, MODEL, STORE, TOKENIZER = "checkpoints", "model", "store", "tokenizer"

#: What the weights of a finished model can be stored in.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Run:
    """A training run in ``folder``, ready to train: its token store, built if need be, and its trainer.

    :meth:`create`, :meth:`branch` and :meth:`reopen` make one.

    Attributes:
        config, folder, world, device: what the names say.
        material: what is trained on, and measured.
        tokenizer: the folder of what goes beside the weights.
        trainer: at the beginning, or at the checkpoint that the run goes on from.
        notes: what the user should know before the run begins, such as newer checkpoints that were passed over.
    """

    def __init__(self, config: TrainConfig, folder: Path, world: World, report: Reporter) -> None:
        self.config, self.folder, self.world = config, folder, world
        any_cuda = config.device in ("auto", "cuda") and torch.cuda.is_available()
        self.device = pick(f"cuda:{world.local_rank}" if any_cuda else config.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # pinned memory and libraries belong to the current one
        recovered = self._recover()
        found, faults = checkpoint.newest(folder / CHECKPOINTS)
        self.notes = recovered + [f"passed over: {fault.what}" for fault in faults]
        # A head's checkpoint is no model: tokenizer and sizes are those of the target.
        parent = config.target or found or config.start_from
        shape = config.model or hub.read_config(hub.resolve(str(parent)))
        kind = Texts if config.objective.learns_from == "texts" else Dialogues
        self._check(shape)
        kind.check(config, self._store_folder, parent, shape)
        shape = kind.enlarged(config, parent, shape)
        if found is None and config.start_from and config.export_dtype is None:
            stored = hub.dtype_of(config.start_from)
            named = next((name for name, dtype in DTYPES.items() if dtype == stored), None)
            config = config.model_copy(update={"export_dtype": named})
        pipeline = Pipeline(config, shape, folder, world) if config.parallel.pipeline > 1 else None
        Shards.check(config, shape)
        shards = Shards.of(config, world, self.device)
        rank, size = world.rank, world.size
        if pipeline:
            rank, size = pipeline.grid.pipeline, pipeline.grid.pipelines
        elif shards:
            rank, size = shards.reader, shards.readers
        rows_of_each(config.batch, size, "processes" if size == world.size else "groups of processes")
        model = self._part(pipeline, found) if pipeline else self._model(found, blank=shards is not None)
        folders.check(model)
        if isinstance(model, Decoder):
            if model.config.vocabulary < shape.vocabulary:
                model.enlarge(shape.vocabulary)
            if next(routed(model), None) is not None:
                raise ConfigError(
                    f"{config.start_from} is an adapter that adds something else for each token, and nothing can be "
                    "trained on top of it",
                    hint="Start from its base; or continue its run with --resume or --branch.",
                )
            self._tell_packed(model)
            self._give_head(model)
            config.tuner.attach(model, config.seed)
            if config.objective.scalar:
                model.head.requires_grad_(True)  # what is not there yet is trained, whatever the tuner trains
        if shards is not None:
            assert isinstance(model, Decoder)  # the configuration refuses heads
            config, precision = self._with_precision(config)
            model = shards.fill(model, precision, found if found and not config.tuner.adds else config.start_from)
        self.material: Material = kind(config, self._store_folder, parent, shape, world, report)
        self.notes += self.material.notes
        self.config = config = config.model_copy(update={"data": self.material.settled()})
        self.tokenizer = folder / TOKENIZER
        self._provide_tokenizer()
        if shards is not None:
            self.material.agreed = lambda seconds: world.largest(seconds)[0]
        if found is None and (world.leads or shards) and isinstance(model, Decoder):
            with shards.measured() if shards else contextlib.nullcontext():
                self.material.prepare(model, folder, report)
        world.barrier()
        self.material.take(folder)
        loader = self.material.loader(rank, size)
        self.trainer = Trainer(config, model, loader, self.tokenizer, folder, world, pipeline, shards)
        self.trainer.validation = Validation(config.validation, self.material, world)
        if found is not None:
            self.trainer.resume(found)
        self.notes += filter(None, (self.trainer.order_note, unfinished_warmup(config, self.trainer.length.steps)))

    def _recover(self) -> list[str]:
        """Makes a checkpoint of what survivors of a lost process have left, if it is newer than those that are there;
        what the user should know of it."""
        route, notes = self.config.pipeline.route, list[str]()
        if self.world.leads and route is not None and route.recovers:
            newest, _ = checkpoint.newest(self.folder / CHECKPOINTS)
            parent = newest or self.config.start_from
            shape = self.config.model or hub.read_config(hub.resolve(str(parent)))
            made = recovery.recover(self.folder, route, shape)
            if isinstance(made, str):
                notes.append(f"{made}; the newest checkpoint counts")
            elif made is not None and (newest is None or made.position["step"] > checkpoint.step_of(newest)):
                like = hub.load(str(parent)) if parent else Decoder(shape)
                state = checkpoint.TrainerState(made.position, made.description, made.groups)
                step, keeping = made.position["step"], checkpoint.Keeping(self.config.keep_checkpoints)
                model = assembled(like, made.weights)
                checkpoint.save(self.folder / CHECKPOINTS, step, model, self.folder / TOKENIZER, state, keeping=keeping)
                notes.append(made.note)
            recovery.forget(self.folder)
        self.world.barrier()
        return notes

    @classmethod
    def create(cls, config: TrainConfig, folder: Path, world: World | None = None, report: Reporter = silent) -> Run:
        """A new run. If it cannot start, ``folder`` is left as it was.

        Raises:
            UsageError: ``folder`` holds a run already.
            PenstockError: the configuration asks for what is not there or does not fit together.
        """
        with _new_folder(folder, world or World()):
            return cls._with_config(config, folder, world or World(), report)

    @classmethod
    def branch(
        cls,
        found: Path,
        folder: Path,
        world: World | None = None,
        overrides: Sequence[str] = (),
        report: Reporter = silent,
    ) -> Run:
        """A new run in ``folder`` that goes on from the checkpoint ``found`` of another run, of which it gets a copy.

        Its configuration is that of the checkpoint with ``overrides``. So several decays can branch from the stable
        phase of one run (MiniCPM's use of its schedule).

        Raises:
            UsageError: there is no such checkpoint, or ``folder`` holds a run already.
            PenstockError: the checkpoint is damaged, or does not fit the configuration.
        """
        world = world or World()
        with _new_folder(folder, world):
            if world.leads:
                checkpoint.copy(found, folder / CHECKPOINTS)
            world.barrier()
            stored = store.moved(checkpoint.load_state(found).description["config"], overrides)
            if stored["data"]["store"] is None:
                stored["data"] = {**stored["data"], "store": str((found.parent.parent / "store").resolve())}
            source = overridden(f"the configuration of {found}", overrides)
            config = build(TrainConfig, apply_overrides(stored, overrides), source)
            return cls._with_config(config, folder, world, report)

    @classmethod
    def reopen(
        cls, folder: Path, world: World | None = None, overrides: Sequence[str] = (), report: Reporter = silent
    ) -> Run:
        """The run that ``folder`` holds, at its newest whole checkpoint, or at the beginning if it has none yet.

        Args:
            folder: the run folder.
            world: this process's place in the run.
            overrides: of its configuration (more steps, say); kept for the next time if the run can go on with them.
            report: shows the progress of building the store.

        Raises:
            UsageError: there is no run.
            PenstockError: all checkpoints are damaged, or do not fit the configuration.
        """
        path = folder / CONFIG
        if not path.is_file():
            raise UsageError(f"{folder} holds no training run", hint="Name a folder with a run.json, or start a run.")
        tree = apply_overrides(store.moved(read_json(path), overrides), overrides)
        config = build(TrainConfig, tree, overridden(str(path), overrides))
        return cls._with_config(config, folder, world or World(), report)

    @classmethod
    def _with_config(cls, config: TrainConfig, folder: Path, world: World, report: Reporter) -> Run:
        """The run, whose configuration is written down when it is seen to work."""
        run = cls(config, folder, world, report)
        if world.leads:
            run.write_config()
        world.barrier()
        return run

    def write_config(self) -> None:
        """Writes down the configuration, with what the machine chose."""
        self.config = self.trainer.config
        write_json(self.folder / CONFIG, self.config.model_dump(mode="json"))

    def _with_precision(self, config: TrainConfig) -> tuple[TrainConfig, Precision]:
        """``config`` with a precision, where it leaves that to the machine, and which that is: shards are made for
        one."""
        if config.precision != "auto":
            return config, config.precision
        answer = fast_precision(self.device, self.world)
        chosen = {**config.chosen, "precision": f"{answer.choice}: {answer.reason}"}
        return config.model_copy(update={"precision": answer.choice, "chosen": chosen}), answer.choice

    def _model(self, found: Path | None, *, blank: bool) -> Trained:
        """What is trained, at the beginning, or the like for the weights of the checkpoint ``found``; ``blank``, on the
        meta device."""
        shape, named, head = self.config.model, self.config.target, self.config.head
        if named is not None:
            target = hub.load(named, device=self.device, dtype=torch.float32)
            if head is not None:
                return Headed.new(target, head, self.config.seed, named)
            drafting, folder = str(self.config.draft), hub.resolve(named)
            require_same_tokens(drafting, hub.resolve(drafting), folder, hub.load_tokenizer(folder))
            draft = hub.load(drafting, device=self.device, dtype=torch.float32)
            return Pair.new(draft, target, self.config.seed, (drafting, named))
        if shape is None:
            # What is added to a base is put on top of it again; checkpoints have both merged, or the former alone.
            source = (None if self.config.tuner.adds else found) or str(self.config.start_from)
            load = hub.load_to_add if self.config.tuner.packs else hub.load
            return hub.blank(source) if blank else load(source, device=self.device, dtype=torch.float32)
        if blank:
            with without_weights():
                return Decoder(shape)
        return (Decoder(shape) if found else Decoder(shape).initialize(self.config.seed)).to(self.device)

    def _part(self, pipeline: Pipeline, found: Path | None) -> Decoder:
        """This process's part of the model at the beginning; at a checkpoint, the trainer fills it."""
        if self.config.model is None:
            pipeline.part.take(hub.load(found or str(self.config.start_from), dtype=torch.float32))
        elif found is None:
            pipeline.part.initialize(self.config.seed)
        return pipeline.part.to(self.device)

    def _give_head(self, model: Decoder) -> None:
        """Gives the model the kind of head that the objective trains.

        Raises:
            ConfigError: it is a reward model, and the objective trains models that write.
        """
        if self.config.objective.scalar and not model.config.scalar_head:
            model.give_scalar_head(self.config.seed)
        elif model.config.scalar_head and not self.config.objective.scalar:
            raise ConfigError(
                f"{self.config.start_from} is a reward model, which writes no text: the objective "
                f"{self.config.objective.policy_name} cannot train it",
                hint="Set objective=reward, or start from the model that it was made of.",
            )

    def _tell_packed(self, model: Decoder) -> None:
        """Notes how much memory quantized matrices take that stay as they are stored."""
        stored = [sum(each.nbytes for each in layer.buffers()) for _, layer in packed_layers(model)]
        if stored:
            self.notes.append(
                f"{len(stored)} matrices of {self.config.start_from} stay quantized, in {sum(stored) / 1e6:.4g} MB: "
                "what is trained lies beside them, and is not merged"
            )

    def _check(self, shape: DecoderConfig) -> None:
        """Whether batch and model fit together."""
        if self.config.batch.length > shape.context:
            raise ConfigError(
                f"sequences of {self.config.batch.length} tokens are longer than the model's context ({shape.context})",
                hint="Shorten the stages of [batch].",
            )

    @property
    def _store_folder(self) -> Path:
        return self.config.data.store or self.folder / STORE

    def _provide_tokenizer(self) -> None:
        """Fills ``tokenizer/``: from the model that the run goes on from, or with the store's tokenizer."""
        if self.world.leads and not self.tokenizer.exists():
            with atomic_folder(self.tokenizer) as folder:
                self.material.provide(folder)
        self.world.barrier()

    def finish(self, report: Reporter = silent, seconds: float | None = None) -> dict[str, Any]:
        """Exports the finished model to ``model/``, evaluates it, and writes and returns ``summary.json``.

        Args:
            report: shows the progress.
            seconds: for the evaluation, of part of the held-out documents if need be; None: as the configuration says.
        """
        self.trainer.use_average()
        model, position = self._exported(), self.trainer.position
        with self.trainer.shards.measured() if self.trainer.shards else contextlib.nullcontext():
            measured = self._evaluate(model, report, seconds)
        summary = {
            **measured,
            "documents": self.material.evaluated_count,
            "tokens_per_s": position.tokens / max(position.seconds, 1e-9),
            "parameters": self.trainer.parameters,
            "steps": position.step,
            "tokens": position.tokens,
            "seconds": position.seconds,
        }
        if position.best is not None:
            summary |= {"best_step": position.best_step, f"best_{self.material.measure}": position.best}
        if self.config.on_bad_update == "skip":
            summary["skipped_updates"] = position.guard.skipped
        if self.world.leads:
            write_json(self.folder / SUMMARY, summary)
        self.world.barrier()
        return summary

    def _exported(self) -> Trained | None:
        """Writes the finished model, and what was added to its base; returns what is to be evaluated, where it is."""
        model, shards, dtype = self.trainer.whole(), self.trainer.shards, DTYPES.get(self.config.export_dtype or "")
        if isinstance(model, Decoder) and self.config.tuner.adds and self.world.leads:
            with atomic_folder(self.folder / hub.ADAPTER) as folder:
                self.config.tuner.write(model, folder, str(self.config.start_from))
        if shards is not None:
            with self.world.blaming():
                shards.export(self.folder / MODEL, self.tokenizer, dtype or self.trainer.weights.dtype)
            return model
        exported: Exported | None = model
        if isinstance(model, Decoder):
            exported = self.config.tuner.exported(model, str(self.config.start_from))
        if exported is not None:
            with atomic_folder(self.folder / MODEL) as folder:
                folders.save(exported, folder, dtype)
                copy_companions(self.tokenizer, folder)
            return model if isinstance(exported, Adapter) else exported
        return model

    def _evaluate(self, whole: Trained | None, report: Reporter, seconds: float | None) -> dict[str, Any]:
        """The material's measure of the model on what is held out, or how often a head agrees with its target there, or
        what it predicts of what that accepts, if anything is. The leading process measures, on its own device; a model
        in shards, all of them."""
        of_head = "agreement" if self.config.draft is None else "acceptance"
        key = self.material.measure if self.config.target is None else of_head
        if not self.material.held_out:
            return {key: None}
        if seconds is None and self.config.evaluation_minutes is not None:
            seconds = 60 * self.config.evaluation_minutes
        measured: float = 0.0
        told: list[float] | dict[str, float] = []
        if whole is not None:
            precise = self.device.type != "cuda"
            with contextlib.nullcontext() if precise else self.trainer.weights.arithmetic(self.device):
                whole = whole.to(self.device).eval()
                if isinstance(whole, Beside):
                    assert isinstance(self.material, Texts)  # of objectives of heads
                    if isinstance(whole, Pair):
                        told = self.material.accepted(whole, report, seconds)
                    else:
                        told = self.material.agreement(whole, report, seconds)
                else:
                    measured = self.material.evaluate(whole, report, seconds)
        everywhere = self.world.largest(measured)[0]
        return {key: told if self.config.target is not None else everywhere}


@contextlib.contextmanager
def _new_folder(folder: Path, world: World) -> Iterator[None]:
    """Within the block a new run comes to be in ``folder``; if that fails, nothing of it stays but a finished store,
    which took long to build: the next attempt finds it there."""
    taken = any((folder / name).exists() for name in (CONFIG, CHECKPOINTS, MODEL))
    fresh = not folder.exists()
    world.barrier()  # All have looked before the first of them writes.
    if taken:
        raise UsageError(
            f"{folder} already holds a training run",
            hint=f"Continue it with '{resume_command(folder)}', or choose another folder with --out.",
        )
    try:
        yield
    except BaseException:
        if world.leads:
            for name in (CHECKPOINTS, TOKENIZER, REFERENCE):
                shutil.rmtree(folder / name, ignore_errors=True)
            (folder / CONFIG).unlink(missing_ok=True)
            if fresh and not (folder / STORE).exists():
                shutil.rmtree(folder, ignore_errors=True)
        raise
