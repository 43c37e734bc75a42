"""What a run asks of its material."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from penstock.core.progress import Reporter, silent
from penstock.data.loader import Batches
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.train.config import DataConfig, TrainConfig


def _own(seconds: float) -> float:
    return seconds


class Material(ABC):
    """What a run trains on, and is measured by.

    Attributes:
        measure: what :meth:`validate` and :meth:`evaluate` give, as records call it.
        unit: the same in words.
        folder: the store's.
        notes: what the user should know.
        agreed: what counts as the time that a measurement has taken, of the seconds that it took here: where processes
            measure together, they are to end together.
    """

    measure: ClassVar[str]
    unit: str
    folder: Path
    notes: list[str]
    agreed: Callable[[float], float] = staticmethod(_own)

    @classmethod
    def enlarged(cls, config: TrainConfig, parent: Path | str | None, shape: DecoderConfig) -> DecoderConfig:
        """The ``shape`` of the model with room for the tokens that it is to learn."""
        return shape

    @property
    @abstractmethod
    def held_out(self) -> int:
        """How many documents or examples are held out."""

    @property
    @abstractmethod
    def evaluated_count(self) -> int:
        """How many of them were evaluated."""

    @abstractmethod
    def settled(self) -> DataConfig:
        """The configuration's section with what the store says where that left something open."""

    @abstractmethod
    def provide(self, folder: Path) -> None:
        """Fills the empty ``folder`` with what goes beside the weights into every model folder of the run."""

    def prepare(self, model: Decoder, folder: Path, report: Reporter) -> None:
        """Computes what the run needs of the model at its beginning into the run folder ``folder``, if anything. The
        leading process of a new run calls this before :meth:`take`; where the model is in shards, all of them do."""
        return

    def take(self, folder: Path) -> None:
        """Takes up what :meth:`prepare` has computed. All processes call this."""
        return

    @abstractmethod
    def loader(self, rank: int, world: int) -> Batches:
        """The batches of the process ``rank`` of ``world``."""

    @abstractmethod
    def validate(self, model: Decoder) -> float:
        """The measure of a model on some of what is held out, the same each time."""

    @abstractmethod
    def evaluate(self, model: Decoder, report: Reporter = silent, seconds: float | None = None) -> float:
        """The measure of the finished model on what is held out, or on a part of it that takes about ``seconds``."""
