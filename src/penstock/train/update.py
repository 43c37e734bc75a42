"""One update: the gradient of a batch, whether it is to be followed, and what the optimizer makes of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from penstock.core.errors import PenstockError
from penstock.data.loader import Batch
from penstock.models.attention import CausalRows, PackedRows
from penstock.models.decoder import Decoder
from penstock.parallel.shard import clip, total_norm
from penstock.parallel.world import World
from penstock.train.batches import Microbatch, microbatches
from penstock.train.config import TrainConfig
from penstock.train.folders import Trained
from penstock.train.layers import run_layers
from penstock.train.loads import Loads
from penstock.train.pipeline.pipeline import Pipeline
from penstock.train.pipeline.post_validated import PostValidated
from penstock.train.precision import Weights
from penstock.train.rates import Rates
from penstock.train.report import Position
from penstock.train.shards.shards import Shards


class Updater:
    """Makes the updates of a run.

    Args:
        config: the run's; its precision is chosen.
        model: on its device; its weights are those of ``weights``.
        weights: the model's, and those that the optimizer updates.
        world: this process's place among those of the run.
        pipeline: where processes hold parts of the model, of which ``model`` is this one's.
        shards: where they hold rows of its parameters.

    Attributes:
        position: how far the run is.
        masters: the parameters that the optimizer updates.
        adds: whether they are added to the model's own, which stay.
        optimizer: what the configuration says.
        names: of the masters, by ``id``.
        averages: the running average of each master, if there is one.
        loads: of the experts.
        loss: the objective's, with what the tuner adds to it, compiled perhaps.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Trained,
        weights: Weights,
        world: World,
        pipeline: Pipeline | None = None,
        shards: Shards | None = None,
    ) -> None:
        self.model, self.weights, self.world, self.pipeline, self.shards = model, weights, world, pipeline, shards
        self.device = next(model.parameters()).device
        self.masters = list(weights.masters.values())
        self.optimizer = config.optim.build(weights.masters)
        self._rates = Rates(weights.masters, config.rates)
        self.adds = config.tuner.adds
        self.names = {id(parameter): name for name, parameter in weights.masters.items()}
        self.averages = [m.detach().clone() for m in self.masters] if config.average else []
        self.loads = Loads(model)
        self._alike = shards.alike if shards else 1  # processes that have the same rows
        tuner = config.tuner
        objective = shards.shared_out(config.objective) if shards else config.objective
        self.loss: Callable[..., Tensor] = lambda model, batch, context: tuner.loss(objective, model, batch, context)
        self.position = Position()
        self._config = config
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]
        if config.activation_checkpointing and isinstance(model, Decoder):
            run_layers(model, recomputes=True)
        self._validated: PostValidated | None = None
        if pipeline:
            pipeline.attach(weights, self.device)
            if config.pipeline.post_validation:
                self._proposed: dict[str, Tensor] = {}  # what the last update measured, once it is settled
                self._validated = pipeline.post_validated(self.optimizer)

    @property
    def recomputes(self) -> bool:
        """Whether activations are computed twice."""
        return self._config.activation_checkpointing

    @property
    def settles_later(self) -> bool:
        """Whether what an update gave is known in the next one."""
        return self._validated is not None

    def microbatches(self, batch: Batch, length: int) -> Iterator[Microbatch]:
        """``batch`` cut to sequences of ``length`` tokens, at most ``batch.micro_tokens`` at a time, on the device."""
        return microbatches(batch, length, self._config.batch.micro_tokens, self.device)

    def rehearse(self, micro: Batch, context: CausalRows | PackedRows) -> None:
        """Forward and backward of a microbatch by what is here of the model, without the other processes; of a model
        in shards, together with them."""
        with explain_memory(self.device):
            if self.pipeline:
                self.pipeline.rehearse(micro, context)
            else:
                with self.weights.arithmetic(self.device):
                    loss = self.loss(self.model, micro, context)
                loss.backward()  # type: ignore[no-untyped-call]
                self.model.zero_grad()

    def update(self, batch: Batch, length: int, factor: float) -> dict[str, Tensor]:
        """Forward, backward and optimizer step on this process's part of a global batch.

        Args:
            batch: windows of the longest length, cut here to ``length`` tokens.
            length: of the sequences.
            factor: the schedule's.

        Returns:
            Scalars on the device, over all processes: ``loss``, ``grad_norm`` and ``grad_l1`` of :class:`Report`.
        """
        if self._validated is not None:
            return self._optimistic(batch, length, factor)
        predicted = self._predicted(batch)
        self._set_rates(factor)
        self.loads.begin()
        if self.pipeline and not self.pipeline.flushes:
            measured = self.pipeline.stream(list(self.microbatches(batch, length)), self._apply)
            self.loads.end(self.world)
        else:
            total, norms = self.gradients(batch, length, predicted)
            measured = {"loss": total, **norms}
            self.loads.end(self.world)
            if not self._good(total, norms["grad_norm"]):
                self.optimizer.zero_grad()
                return {**measured, "skipped": torch.ones(())}
            if self._config.clip is not None:
                clip(self.masters, self._config.clip, norms["grad_norm"])
            self._apply()
        self._average(self.position.step + 1)
        return measured

    def _predicted(self, batch: Batch) -> Tensor:
        """By how much the summed loss of the update is divided, over all processes."""
        if self.pipeline:
            predicted = self.pipeline.predicted(batch)
        else:
            predicted = self._config.objective.count(batch).to(self.device, torch.float32)
            self.world.sum_([predicted])
            predicted /= self._alike
        return predicted.clamp_(min=1)

    def _set_rates(self, factor: float) -> None:
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor

    def _average(self, updates: int) -> None:
        if self._config.average is not None:
            with torch.no_grad():
                self._config.average.update(self.averages, self.masters, updates)

    def _optimistic(self, batch: Batch, length: int, factor: float) -> dict[str, Tensor]:
        """An update that is settled in the next one, or by :meth:`settle`; only then is in the result what it gave."""
        assert self.pipeline is not None and self._validated is not None
        micros, predicted = list(self.microbatches(batch, length)), self._predicted(batch)
        loss = self.pipeline.backward(micros, predicted, confirm=self.settle)
        self._set_rates(factor)  # the update before this one is settled: it may have needed its own until then
        self._validated.propose(self.pipeline.over_pipelines(loss))
        self.weights.publish()
        self._proposed = {}
        return self._proposed

    def settle(self) -> bool:
        """Makes the last update final where it is not, with post-validation; whether the weights were right already."""
        settled = None if self._validated is None else self._validated.settle()
        if settled is None:
            return True
        self._proposed.update(settled.measured)
        self.optimizer.zero_grad()
        if not settled.kept:
            self.weights.publish()
        self._average(self.position.step)
        return settled.kept

    def _apply(self) -> None:
        """Updates the weights by the gradients in the masters, and clears these."""
        self._rates.step(self.optimizer)
        self.optimizer.zero_grad()
        self.weights.publish()

    def _good(self, loss: Tensor, norm: Tensor) -> bool:
        """Whether to make an update with this gradient."""
        if self._config.on_bad_update == "stop":
            return True
        return self.position.guard.admits(loss.item(), norm.item(), self._config.spike)

    def gradients(self, batch: Batch, length: int, predicted: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Leaves the gradients over all processes in the masters; returns the loss over all, and the norms."""
        total = torch.zeros((), device=self.device)
        micros = self.microbatches(batch, length)
        if self.pipeline:
            total += self.pipeline.backward(list(micros), predicted)
            self.world.sum_([total])
            return total, self.pipeline.norms()
        for micro, context in micros:
            with self.weights.arithmetic(self.device):
                loss = self.loss(self.model, micro, context) / predicted
            loss.backward()  # type: ignore[no-untyped-call]
            self.weights.collect_gradients()
            total += loss.detach()
        gradients = {name: m.grad for name, m in self.weights.masters.items() if m.grad is not None}
        # Those of shards were summed when they were computed.
        self.world.sum_([*(grad for grad in gradients.values() if not isinstance(grad, DTensor)), total])
        if self.shards:
            self.shards.settle(gradients)
        return total / self._alike, {"grad_norm": self.norm(gradients), "grad_l1": self.norm(gradients, 1.0)}

    def norm(self, tensors: Mapping[str, Tensor], order: float = 2.0) -> Tensor:
        """The norm of the named masters together, or of their gradients, over all processes that have some of them."""
        return self.shards.total_norm(tensors, order) if self.shards else total_norm(list(tensors.values()), order)

    def use_average(self) -> None:
        """Puts the averaged weights into the model."""
        if self.averages:
            self.weights.load(dict(zip(self.weights.masters, self.averages, strict=True)))


@contextlib.contextmanager
def explain_memory(device: torch.device) -> Iterator[None]:
    """Says what to do where the memory of ``device`` does not suffice for what the block computes."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PenstockError(
            f"the memory of {device} does not suffice",
            hint="Lower batch.micro_tokens, which leaves the batch as it is, set activation_checkpointing = true, or "
            'let several devices hold the model together: parallel.shard = "all".',
        ) from error
