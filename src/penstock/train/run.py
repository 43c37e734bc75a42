"""A run folder: what a training run reads and leaves.

``run.json`` is the complete configuration; ``store/`` the token store, unless the configuration names another;
``metrics.jsonl`` a record for each update; ``checkpoints/`` the newest checkpoints; ``model/`` the finished model, a
Hugging Face folder; ``loss.png`` the loss curve; ``summary.json`` what came out. A pipeline adds ``pipeline.json``,
what its stages cost, and ``pipeline-trace.json``, the timeline of an update, measured and simulated.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from penstock.core.config import apply_overrides, build
from penstock.core.devices import pick
from penstock.core.errors import ConfigError, DataError, UsageError
from penstock.core.files import atomic_folder, read_json, write_json
from penstock.core.progress import Reporter, silent
from penstock.data.building import training_texts
from penstock.data.loader import Loader
from penstock.data.store import TokenStore
from penstock.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer
from penstock.models import hub
from penstock.models.decoder import Decoder
from penstock.parallel.world import World
from penstock.train import checkpoint
from penstock.train.config import TrainConfig
from penstock.train.evaluate import bits_per_byte
from penstock.train.loop import Trainer, resume_command
from penstock.train.pipelined import Pipeline

CONFIG, SUMMARY, CHECKPOINTS, MODEL = "run.json", "summary.json", "checkpoints", "model"


class Run:
    """A training run in ``folder``, ready to train: its token store, built if need be, and its trainer.

    :meth:`create`, :meth:`branch` and :meth:`reopen` make one.

    Attributes:
        config, folder, world, device, store: what the names say.
        tokenizer: the folder of the store's tokenizer.
        trainer: at the beginning, or at the checkpoint that the run goes on from.
        faults: what is wrong with newer checkpoints that were passed over.
    """

    def __init__(self, config: TrainConfig, folder: Path, world: World, report: Reporter) -> None:
        self.config, self.folder, self.world = config, folder, world
        any_cuda = config.device in ("auto", "cuda") and torch.cuda.is_available()
        self.device = pick(f"cuda:{world.local_rank}" if any_cuda else config.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # pinned memory and libraries belong to the current one
        found, self.faults = checkpoint.newest(folder / CHECKPOINTS)
        pipeline = self._pipeline(found) if config.parallel.pipeline > 1 else None
        model = self._part(pipeline, found) if pipeline else self._model(found)
        self.store = self._open_store(found, report)
        self.tokenizer = self.store.folder / "tokenizer"
        self._check(model)
        loader = Loader(
            self.store.split("train"),
            length=config.batch.length,
            sampler=config.data.sampler,
            seed=config.seed,
            rank=pipeline.grid.pipeline if pipeline else world.rank,
            world=pipeline.grid.pipelines if pipeline else world.size,
        )
        self.trainer = Trainer(config, model, loader, self.tokenizer, folder, world, pipeline)
        if found is not None:
            self.trainer.resume(found)

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
            stored = dict(checkpoint.load_state(found).description["config"])
            if stored["data"]["store"] is None:
                stored["data"] = {**stored["data"], "store": str((found.parent.parent / "store").resolve())}
            config = build(TrainConfig, apply_overrides(stored, overrides), f"the configuration of {found}")
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
        config = build(TrainConfig, apply_overrides(read_json(path), overrides), str(path))
        return cls._with_config(config, folder, world or World(), report)

    @classmethod
    def _with_config(cls, config: TrainConfig, folder: Path, world: World, report: Reporter) -> Run:
        """The run, whose configuration is written down when it is seen to work."""
        run = cls(config, folder, world, report)
        if world.leads:
            write_json(folder / CONFIG, config.model_dump(mode="json"))
        world.barrier()
        return run

    def _model(self, found: Path | None) -> Decoder:
        """The model at the beginning, or one of the same shape for the weights of the checkpoint ``found``."""
        shape = self.config.model
        if shape is None:
            return hub.load(found or str(self.config.start_from), device=self.device, dtype=torch.float32)
        return (Decoder(shape) if found else Decoder(shape).initialize(self.config.seed)).to(self.device)

    def _pipeline(self, found: Path | None) -> Pipeline:
        shape = self.config.model or hub.read_config(hub.resolve(found or str(self.config.start_from)))
        return Pipeline(self.config, shape, self.folder, self.world)

    def _part(self, pipeline: Pipeline, found: Path | None) -> Decoder:
        """This process's part of the model at the beginning; at a checkpoint, the trainer fills it."""
        if self.config.model is None:
            pipeline.part.take(hub.load(found or str(self.config.start_from), dtype=torch.float32))
        elif found is None:
            pipeline.part.initialize(self.config.seed)
        return pipeline.part.to(self.device)

    def _open_store(self, found: Path | None, report: Reporter) -> TokenStore:
        folder = self.config.data.store or self.folder / "store"
        if self.world.leads and not folder.exists():
            self._build_store(folder, report)
        self.world.barrier()
        parent = found or self.config.start_from
        return TokenStore.open(folder, tokenizer=load_tokenizer(hub.resolve(parent)) if parent else None)

    def _build_store(self, folder: Path, report: Reporter) -> None:
        data, parent = self.config.data, self.config.start_from
        if parent is None:
            tokenizer = train_tokenizer(training_texts(data.corpus, data.held_out, report), data.vocabulary)
            end_of_text = END_OF_TEXT
        else:
            tokenizer, end_of_text = _tokenizer_of(parent)
        TokenStore.build(
            data.corpus, tokenizer, folder, held_out=data.held_out, end_of_text=end_of_text, progress=report
        )

    def _check(self, model: Decoder) -> None:
        """Whether model, store and batch fit together."""
        vocabulary, shape = self.store.manifest.vocabulary, model.config
        if vocabulary > shape.vocabulary:
            raise ConfigError(
                f"the token store has {vocabulary} tokens, the model only {shape.vocabulary}",
                hint="Set model.vocabulary, or use a store that was made with the model's tokenizer.",
            )
        if self.config.batch.length > shape.context:
            raise ConfigError(
                f"sequences of {self.config.batch.length} tokens are longer than the model's context ({shape.context})",
                hint="Shorten the stages of [batch].",
            )
        if not self.store.split("held_out").documents:
            raise DataError(
                f"the token store {self.store.folder} has no held-out documents, so the model could not be evaluated",
                hint="Raise data.held_out: a small corpus needs a larger share.",
            )

    def finish(self, report: Reporter = silent) -> dict[str, Any]:
        """Exports the finished model to ``model/``, evaluates it, and writes and returns ``summary.json``."""
        self.trainer.use_average()
        model, position = self.trainer.whole(), self.trainer.position
        if model is not None:
            with atomic_folder(self.folder / MODEL) as folder:
                hub.save(model, folder)
                for file in sorted(self.tokenizer.iterdir()):
                    shutil.copyfile(file, folder / file.name)
        summary = {
            "bits_per_byte": self._evaluate(model, report),
            "tokens_per_s": position.tokens / max(position.seconds, 1e-9),
            "parameters": self.trainer.parameters,
            "steps": position.step,
            "tokens": position.tokens,
            "seconds": position.seconds,
        }
        if self.world.leads:
            write_json(self.folder / SUMMARY, summary)
        self.world.barrier()
        return summary

    def _evaluate(self, whole: Decoder | None, report: Reporter) -> float:
        """Bits per byte on the held-out documents. The leading process measures, on its own device; all know then."""
        measured = 0.0
        if whole is not None:
            precise = self.device.type != "cuda"
            with contextlib.nullcontext() if precise else self.trainer.weights.arithmetic(self.device):
                measured = bits_per_byte(
                    whole.to(self.device).eval(),
                    self.store.split("held_out"),
                    window=self.config.batch.length,
                    report=report,
                )
        return self.world.largest(measured)[0]


def _tokenizer_of(model: str) -> tuple[Tokenizer, str]:
    """The tokenizer of a model, and the token that ends its texts."""
    end_of_text = hub.load_tokenizer(model).eos_token
    if end_of_text is None:
        raise DataError(
            f"the tokenizer of {model} has no token that ends a text",
            hint="Build a store with 'penstock data build --tokenizer --end-of-text', and name it in data.store.",
        )
    return load_tokenizer(hub.resolve(model)), end_of_text


@contextlib.contextmanager
def _new_folder(folder: Path, world: World) -> Iterator[None]:
    """Within the block a new run comes to be in ``folder``; if that fails, nothing of it stays."""
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
            shutil.rmtree(folder if fresh else folder / CHECKPOINTS, ignore_errors=True)
            (folder / CONFIG).unlink(missing_ok=True)
        raise
