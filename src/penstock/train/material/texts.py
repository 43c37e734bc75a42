"""Texts of a token store as the material of a run."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from penstock.core.errors import ConfigError
from penstock.core.progress import Reporter, silent
from penstock.data.loader import Loader
from penstock.data.store import TokenStore
from penstock.data.tokenizer import declared
from penstock.models import hub
from penstock.models.acceptance.head import Pair
from penstock.models.companions import copy_companions, end_with
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.heads.headed import Headed
from penstock.parallel.world import World
from penstock.train.config import DataConfig, TrainConfig
from penstock.train.evaluate import Sample, affordable, agreement, bits_per_byte, predicted_acceptance
from penstock.train.material import store
from penstock.train.material.contract import Material
from penstock.train.objectives.acceptance import Acceptance
from penstock.train.validation import beginning_of


class Texts(Material):
    """The documents of a token store; the measure is bits per byte of those held out.

    Attributes:
        store: the store, built if need be.
        evaluated: the documents that :meth:`evaluate` takes.
    """

    measure: ClassVar[str] = "bits_per_byte"
    unit = "bits per byte"

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        parent: Path | str | None,
        shape: DecoderConfig,
        world: World,
        report: Reporter,
    ) -> None:
        self._config, self.folder, self._parent, self.notes = config, folder, parent, []
        if world.leads and not folder.exists():
            store.build(config.data, folder, parent, shape.vocabulary, report)
        world.barrier()
        self.store = self._opened(shape)
        split = self.store.split("held_out")
        self.evaluated = Sample(split, range(split.documents))
        self._validated = beginning_of(split, config.validation.tokens)

    @classmethod
    def check(cls, config: TrainConfig, folder: Path, parent: Path | str | None, shape: DecoderConfig) -> None:
        """Whether a store can be built for the model, as far as that can be told before the corpus is read."""
        if parent is not None and not folder.exists():
            store.check_tokenizer(config.data, parent, shape.vocabulary)

    def _opened(self, shape: DecoderConfig) -> TokenStore:
        opened = store.open_store(self._config.data, self.folder, self._parent)
        if opened.manifest.vocabulary > shape.vocabulary:
            raise ConfigError(
                f"the token store has {opened.manifest.vocabulary} tokens, the model only {shape.vocabulary}",
                hint="Set model.vocabulary, or use a store that was made with the model's tokenizer.",
            )
        if opened.manifest.left_out:
            self.notes.append(f"of the token store {self.folder}, {opened.manifest.left_out}")
        if not opened.split("held_out").documents:
            self.notes.append(
                f"the token store {self.folder} has no held-out documents, so the model will not be evaluated; "
                "to have some, build it with a larger share (data.held_out, or --held-out)"
            )
        return opened

    @property
    def held_out(self) -> int:
        return self.store.split("held_out").documents

    @property
    def evaluated_count(self) -> int:
        return self.evaluated.documents

    def settled(self) -> DataConfig:
        return store.settled(self._config.data, self.store.manifest)

    def provide(self, folder: Path) -> None:
        manifest = self.store.manifest
        source = hub.resolve(self._parent) if self._parent else self.store.folder / "tokenizer"
        copy_companions(source, folder)
        if declared(folder, "eos_token") != manifest.end_of_text:
            others = hub.config_end_tokens(source) if self._parent else []
            end_with(folder, manifest.end_of_text_id, others)

    def loader(self, rank: int, world: int) -> Loader:
        config = self._config
        return Loader(
            self.store.split("train"),
            length=config.batch.length,
            sampler=config.data.sampler,
            seed=config.seed,
            rank=rank,
            world=world,
        )

    def validate(self, model: Decoder) -> float:
        return bits_per_byte(model, self._validated, window=self._config.batch.length)

    def evaluate(self, model: Decoder, report: Reporter = silent, seconds: float | None = None) -> float:
        window = self._config.batch.length
        if seconds is not None:
            split = self.store.split("held_out")
            self.evaluated = affordable(model, split, window=window, seconds=seconds, agreed=self.agreed)
        return bits_per_byte(model, self.evaluated, window=window, report=report)

    def agreement(self, model: Headed, report: Reporter = silent, seconds: float | None = None) -> list[float]:
        """How often the guesses of a head are its target's likeliest tokens on what is held out, by tokens ahead."""
        window = self._config.batch.length
        if seconds is not None:
            self.evaluated = affordable(model.target, self.store.split("held_out"), window=window, seconds=seconds)
        return agreement(model, self.evaluated, window=window, report=report)

    def accepted(self, pair: Pair, report: Reporter = silent, seconds: float | None = None) -> dict[str, float]:
        """What the target of a pair accepts on what is held out, beside what its head predicts."""
        window, objective = self._config.batch.length, self._config.objective
        assert isinstance(objective, Acceptance)
        if seconds is not None:
            self.evaluated = affordable(pair.target, self.store.split("held_out"), window=window, seconds=seconds)
        return predicted_acceptance(pair, objective, self.evaluated, window=window, report=report)
