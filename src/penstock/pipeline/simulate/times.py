"""Measured or assumed times of a pipeline's work, as an option of policies, a costs file, and the simulator's costs."""

from __future__ import annotations

from pydantic import Field, field_validator

from penstock.core.config import Config
from penstock.core.errors import UsageError
from penstock.pipeline.ir.schedule import Kind, Schedule
from penstock.pipeline.partition.balanced import balanced
from penstock.pipeline.simulate.simulator import Costs, Link


class StagesError(UsageError):
    """The times are lists for another number of stages than a schedule has."""


class Piece(Config):
    """What F, I and W of a layer, of the embedding or of the head take for one microbatch, and the bytes of its
    weights."""

    forward: float = Field(ge=0)
    input_grad: float = Field(ge=0)
    weight_grad: float = Field(ge=0)
    weights: float = Field(0.0, ge=0)

    @property
    def seconds(self) -> float:
        """Of all three."""
        return self.forward + self.input_grad + self.weight_grad


class Way(Config):
    """The time of a transfer from one device to another."""

    source: int
    target: int
    seconds: float = Field(ge=0)


class Times(Config):
    """What F, I, W and a transfer take for one microbatch, in units that are free as long as they agree.

    Attributes:
        forward, input_grad, weight_grad: one number for a p-th of the model, or a list with one for each stage.
        pieces: the embedding, the layers and the head, where they are known: of them are the stages of a pipeline with
            another number of stages than those lists have, cut so that the slowest one is as fast as it can be.
        transfer: between two devices.
        ways: those between which it takes another time.
        host: of the activation of a microbatch on a p-th of the model, between a device and its host's memory.
        output: of one product with the vocabulary's matrix on one device. F, I and W of the whole output layer take one
            each, on top of the last stage's. Looking up embeddings takes no time.
        deferred: of the activation of a microbatch, the share that W still needs after I.
        overlap: the time of an overlapped pair of F and B, as a share of what both take after each other.
    """

    forward: float | tuple[float, ...] = 1.0
    input_grad: float | tuple[float, ...] = 1.0
    weight_grad: float | tuple[float, ...] = 1.0
    pieces: tuple[Piece, ...] = ()
    transfer: float = Field(0.0, ge=0)
    ways: tuple[Way, ...] = ()
    host: float = Field(1.0, ge=0)
    output: float = Field(0.0, ge=0)
    deferred: float = Field(1.0, ge=0, le=1)
    overlap: float = Field(1.0, gt=0, le=1)

    @field_validator("forward", "input_grad", "weight_grad")
    @classmethod
    def _not_negative(cls, value: float | tuple[float, ...]) -> float | tuple[float, ...]:
        if any(seconds < 0 for seconds in (value if isinstance(value, tuple) else (value,))):
            raise ValueError("times are not negative")
        return value

    def each(self, field: str, stages: int, share: float = 1.0) -> tuple[float, ...]:
        """The times of ``field`` for each of ``stages``, of which one is ``share`` times a p-th of the model, and the
        last has the output layer too.

        Raises:
            StagesError: the times are a list for another number of stages.
        """
        value = getattr(self, field)
        if not isinstance(value, tuple):
            return (value * share,) * (stages - 1) + (value * share + self.output,)
        if len(value) != stages and self.pieces:
            cut = self._pieces_of(stages)
            return tuple(sum(getattr(piece, field) for piece in pieces) for pieces in cut)
        if len(value) != stages:
            raise StagesError(
                f"the times of {field} are for {len(value)} stages, and this pipeline has {stages}",
                hint="Give one number for all stages, or a list with one for each.",
            )
        return (*value[:-1], value[-1] + self.output)

    def _pieces_of(self, stages: int) -> list[tuple[Piece, ...]]:
        """What each stage consists of."""
        embedding, *layers, head = self.pieces
        seconds = [layer.seconds for layer in layers]
        try:
            ranges = balanced(seconds, stages, first=embedding.seconds, last=head.seconds)
        except UsageError as error:
            raise StagesError(error.what, hint=error.hint) from error
        cut = [tuple(layers[own.start : own.stop]) for own in ranges]
        cut[0] = (embedding, *cut[0])
        cut[-1] = (*cut[-1], head)
        return cut

    @property
    def product(self) -> float:
        """Of one product with the vocabulary's matrix: ``output``, or a third of the head where pieces are known."""
        return self.output or (self.pieces[-1].seconds / 3 if self.pieces else 0.0)

    def without_output(self) -> Times:
        """The times of a model without its output layer."""
        if self.output or not self.pieces:
            return self.model_copy(update={"output": 0.0})
        head, changes = self.pieces[-1], {}
        for field in ("forward", "input_grad", "weight_grad"):
            value = getattr(self, field)
            if isinstance(value, tuple):
                changes[field] = (*value[:-1], max(0.0, value[-1] - getattr(head, field)))
        nothing = Piece(forward=0.0, input_grad=0.0, weight_grad=0.0)
        return self.model_copy(update={**changes, "pieces": (*self.pieces[:-1], nothing)})

    def costs(self, schedule: Schedule) -> Costs:
        """The simulator's costs of ``schedule``; activations and weights are those of a p-th of the model.

        Raises:
            StagesError: the times are lists for another number of stages.
        """
        stages = schedule.stages
        share = schedule.devices / stages
        layers = self.without_output() if schedule.barriers else self
        # With one barrier, S has the product for the gradient too, and T is left with that for the weights.
        product, first = self.product / schedule.devices, 2 if schedule.barriers == 1 else 1
        return Costs(
            forward=layers.each("forward", stages, share),
            input_grad=layers.each("input_grad", stages, share),
            weight_grad=layers.each("weight_grad", stages, share),
            shards={Kind.S: first * product, Kind.T: (3 - first) * product},
            activation=(share,) * stages,
            deferred=(share * self.deferred,) * stages,
            weights=(share,) * stages,
            link=Link(latency=self.transfer),
            links={(way.source, way.target): Link(latency=way.seconds) for way in self.ways},
            host=Link(latency=self.host * share),
            overlap=self.overlap,
        )
