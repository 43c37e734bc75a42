"""Conversations and preferences as the material of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, cast

import torch

from penstock.core.errors import ConfigError
from penstock.core.files import read_json, read_text, write_atomic, write_json
from penstock.core.progress import Reporter, silent
from penstock.data.chats.examples import Examples, ExampleStore, Kind
from penstock.data.chats.packing import Packed, PackedLoader
from penstock.data.chats.template import Learnt, Template
from penstock.data.corpora.records import Records
from penstock.data.loader import Batch
from penstock.data.manifest import SPLITS, SplitName
from penstock.data.samplers.shuffle import Shuffle
from penstock.data.tokenizer import fingerprint, size_of, with_tokens
from penstock.models import hub
from penstock.models.companions import copy_companions, end_with
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.parallel.world import World
from penstock.train.batches import microbatches
from penstock.train.config import HELD_OUT, DataConfig, TrainConfig
from penstock.train.material import reference, teacher
from penstock.train.material.contract import Material

#: The folder of a run with what the model at its beginning finds probable.
REFERENCE = "reference"

#: The folder of a run with what a teacher says.
TEACHER = "teacher"

#: Where the configuration names what is read as each kind.
KEYS: dict[Kind, str] = {"chats": "chats", "preferences": "preferences", "ratings": "ratings"}


class Dialogues(Material):
    """The examples of a data set, packed into rows; the measure is the mean loss of those held out.

    Attributes:
        store: the store, built if need be.
    """

    measure: ClassVar[str] = "held_out_loss"

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        parent: Path | str | None,
        shape: DecoderConfig,
        world: World,
        report: Reporter,
    ) -> None:
        self._config, self.folder, self._parent, self.notes = config, folder, str(parent), []
        self._leads = world.leads
        self._kind = cast(Kind, config.objective.learns_from)
        self.unit = f"nats a {config.objective.unit}"
        if world.leads and not folder.exists():
            self._build(report)
        world.barrier()
        self.store = self._opened(shape)
        self._evaluated = 0
        self._reference: Path | None = None
        self._teacher: Path | None = None
        self._tell(PackedLoader(self.store.split("train"), **self._order(0, 1)).packed)

    @classmethod
    def check(cls, config: TrainConfig, folder: Path, parent: Path | str | None, shape: DecoderConfig) -> None:
        """Whether the configuration names what it needs."""
        kind = cast(Kind, config.objective.learns_from)
        key, name = KEYS[kind], config.objective.policy_name
        if getattr(config.data, key) is None and not folder.exists():
            raise ConfigError(
                f"the objective {name} learns from {kind}, and data.{key} names none",
                hint=f"Give a file of them: --set data.{key}={key}.jsonl",
            )
        taught = config.objective.teacher
        if taught is not None and not taught.source:
            raise ConfigError(
                f"the objective {name} learns from a teacher, and objective.source names none",
                hint="Give a model, or the address of a server: --set objective.source=http://127.0.0.1:8000",
            )
        if parent is None:
            raise ConfigError(
                f"the objective {name} needs a model that has a tokenizer: set start_from in place of [model]"
            )
        if len(config.batch.stages) > 1:
            raise ConfigError(
                f"the objective {name} packs whole examples into rows of one length, and batch.stages has "
                f"{len(config.batch.stages)}"
            )

    @classmethod
    def enlarged(cls, config: TrainConfig, parent: Path | str | None, shape: DecoderConfig) -> DecoderConfig:
        if not config.data.new_tokens:
            return shape
        tokens = size_of(with_tokens(hub.resolve(str(parent)), config.data.new_tokens))
        return shape.model_copy(update={"vocabulary": max(shape.vocabulary, tokens)})

    def _build(self, report: Reporter) -> None:
        data = self._config.data
        ExampleStore.build(
            cast(Records, self._source),
            self._kind,
            Template(hub.resolve(self._parent), data.chat_template, data.new_tokens),
            self.folder,
            learnt=self._learnt,
            held_out=HELD_OUT if data.held_out is None else data.held_out,
            skip_bad=data.skip_bad,
            progress=report,
        )

    @property
    def _source(self) -> Records | None:
        source: Records | None = getattr(self._config.data, KEYS[self._kind])
        return source

    @property
    def _learnt(self) -> Learnt:
        return cast(Learnt, getattr(self._config.objective, "learnt", "last"))

    def _opened(self, shape: DecoderConfig) -> ExampleStore:
        opened = ExampleStore.open(self.folder)
        manifest, data = opened.manifest, self._config.data
        asked: dict[str, tuple[Any, Any]] = {
            "objective": (self._kind, manifest.kind),
            f"data.{KEYS[self._kind]}": (self._source and self._source.describe(), manifest.source),
            "data.held_out": (data.held_out, manifest.held_out),
            "objective.learnt": (self._learnt, manifest.learnt),
        }
        differing = [f"{key}: {want}, not {there}" for key, (want, there) in asked.items() if want not in (None, there)]
        if fingerprint(with_tokens(hub.resolve(self._parent), data.new_tokens)) != manifest.tokenizer:
            differing.append("the tokenizer: the model has another one")
        if differing:
            raise ConfigError(
                f"the store {self.folder} is not the one that the configuration describes:\n  "
                + "\n  ".join(differing),
                hint="Name another folder in data.store, or start a new run.",
            )
        if manifest.vocabulary > shape.vocabulary:
            raise ConfigError(f"the tokenizer has {manifest.vocabulary} tokens, the model only {shape.vocabulary}")
        return opened

    def _tell(self, packed: Packed) -> None:
        manifest, length = self.store.manifest, self._config.batch.length
        if manifest.skipped:
            self.notes.append(f"{manifest.skipped:,} records were skipped, the first since {manifest.first_skipped}")
        if packed.cut:
            self.notes.append(f"{packed.cut:,} {self._kind} are longer than {length} tokens, and cut there")
        if packed.left_out:
            self.notes.append(f"{packed.left_out:,} {self._kind} are left out: nothing is learnt from {length} tokens")
        if not manifest.splits["held_out"].examples:
            self.notes.append(f"none of the {self._kind} are held out, so the model will not be evaluated")

    @property
    def held_out(self) -> int:
        return self.store.manifest.splits["held_out"].examples

    @property
    def evaluated_count(self) -> int:
        return self._evaluated

    def settled(self) -> DataConfig:
        return self._config.data.model_copy(update={"held_out": self.store.manifest.held_out})

    def provide(self, folder: Path) -> None:
        source = hub.resolve(self._parent)
        copy_companions(source, folder)
        if self._config.data.new_tokens:
            tokenizer = with_tokens(source, self._config.data.new_tokens)
            write_atomic(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
        if self._config.data.chat_template is not None:
            _take_template(folder, read_text(self._config.data.chat_template))
        for token in self.store.manifest.ends:
            end_with(folder, token, hub.config_end_tokens(source))

    def _order(self, rank: int, world: int) -> dict[str, Any]:
        config = self._config
        return {
            "length": config.batch.length,
            "sampler": config.data.sampler,
            "seed": config.seed,
            "rank": rank,
            "world": world,
        }

    def loader(self, rank: int, world: int) -> PackedLoader:
        return PackedLoader(self._examples("train"), **self._order(rank, world))

    def prepare(self, model: Decoder, folder: Path, report: Reporter) -> None:
        config, taught = self._config, self._config.objective.teacher
        if config.objective.refers:
            found = reference.compute(model, self.store, config.batch, report)
            if self._leads:
                reference.write(found, folder / REFERENCE)
        if taught is not None and self._leads:
            tokens, device = config.batch.micro_tokens or config.batch.tokens, str(model.like.device)
            teacher.compute(taught, self.store, folder / TEACHER, tokens, device, report)

    def take(self, folder: Path) -> None:
        if self._config.objective.refers:
            self._reference = folder / REFERENCE
        if self._config.objective.teacher is not None:
            self._teacher = folder / TEACHER
        for name in SPLITS:
            self._examples(name)

    def _examples(self, name: SplitName) -> Examples:
        examples = self.store.split(name)
        if self._reference is not None:
            found = reference.read(examples, self._reference, name, self._config.batch.length)
            examples.extras["reference"] = found
        taught = self._config.objective.teacher
        if self._teacher is not None and taught is not None:
            examples.tokenwise |= teacher.read(examples, self._teacher, name, taught.top)
        return examples

    def validate(self, model: Decoder) -> float:
        return self._mean(model, silent, rows=max(1, self._config.validation.tokens // self._config.batch.length))

    def evaluate(self, model: Decoder, report: Reporter = silent, seconds: float | None = None) -> float:
        return self._mean(model, report, seconds=seconds)

    @torch.no_grad()
    def _mean(self, model: Decoder, report: Reporter, rows: int | None = None, seconds: float | None = None) -> float:
        """The mean loss of up to so many held-out rows, or of those that ``seconds`` suffice for; always the same
        first ones."""
        batch, device = self._config.batch, model.like.device
        loader = PackedLoader(self._examples("held_out"), length=batch.length, sampler=Shuffle(), seed=0)
        count = min(rows or loader.samples, loader.samples)
        began, loss, counted, done = time.monotonic(), 0.0, 0.0, 0
        with report("evaluating", count, "row") as bar:
            for part in _parts(loader, count, max(1, (batch.micro_tokens or batch.tokens) // batch.length)):
                for micro, context in microbatches(part, batch.length, batch.micro_tokens, device):
                    hidden = model(micro.tokens, context).hidden
                    loss += self._config.objective.hidden_loss(model, hidden, micro).item()
                    counted += self._config.objective.count(micro).item()
                done += len(part.tokens)
                bar.advance(len(part.tokens))
                if seconds is not None and self.agreed(time.monotonic() - began) > seconds:
                    break
        self._evaluated = sum(len(loader.packed.rows[row]) for row in loader.order(0, done))
        return loss / max(counted, 1)


def _parts(loader: PackedLoader, count: int, rows: int) -> Iterator[Batch]:
    for start in range(0, count, rows):
        yield loader.batch(start, min(rows, count - start))


def _take_template(folder: Path, template: str) -> None:
    """Makes ``template`` the one of the model that ``folder`` lies beside."""
    write_atomic(folder / "chat_template.jinja", template)
    path = folder / "tokenizer_config.json"
    stored = read_json(path) if path.is_file() else {}
    if isinstance(stored, dict) and stored.pop("chat_template", None) is not None:
        write_json(path, stored)
    (folder / "chat_template.json").unlink(missing_ok=True)
