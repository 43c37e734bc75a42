"""Training a model in shards: what the loop does differently where each process holds some rows of every parameter."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from penstock.models import hub
from penstock.models.adapters import low_rank
from penstock.models.blank import without_weights
from penstock.models.companions import copy_companions
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.parallel.shard import meshes_of, reshard, total_norm, whole
from penstock.parallel.shared_folder import Entry, SharedFolder
from penstock.parallel.world import World
from penstock.train import checkpoint
from penstock.train.checkpoint import Keeping, TrainerState
from penstock.train.config import TrainConfig
from penstock.train.layers import compile_layers, run_layers
from penstock.train.objectives.contract import Objective
from penstock.train.precision import Precision
from penstock.train.saving import copied
from penstock.train.shards.division import Division, OwnParts
from penstock.train.shards.filling import fill, source_of
from penstock.train.shards.shared_loss import shared_out as shared_out_loss


class Shards:
    """This process's shards of a run's model, and the exchange of what one process alone does not have.

    Parameters and all that belongs to them are known by the names that they have in the whole Decoder. Each has an
    owner among the processes, who writes it, whole, into checkpoints and into the finished model: so neither results
    nor checkpoints depend on the layout, and no process has to hold more than its part of either. PyTorch's own sharded
    checkpoints are not used: their planners exchange pickles, they know no names on disk but those of modules, so that
    none would be a model folder, and what a killed process leaves of one looks like a checkpoint.

    Args:
        config: the run's; its ``parallel`` section says how many processes hold the model together, and how many
            compute each layer together.
        world: this process's place.
        device: this process's.

    Attributes:
        model: in shards, once it is filled; of its layers, this process's share.
        parameters: how many the whole model has.
        alike: how many processes have the same rows of each batch, for they compute each layer together.
        reader, readers: which of how many parts of each batch is this process's.

    Raises:
        UsageError: the processes do not make whole groups of so many.
    """

    model: Decoder
    parameters: int

    def __init__(self, config: TrainConfig, world: World, device: torch.device) -> None:
        self._config, self._world, self._device = config, world, device
        wanted, self.alike = config.parallel.shard, config.parallel.tensor
        shards = max(world.size // self.alike, 1) if wanted == "all" else wanted
        self._meshes = meshes_of(world, shards, self.alike, device)
        self.reader, self.readers = world.rank // self.alike, world.size // self.alike
        self._division: Division | None = None

    @classmethod
    def of(cls, config: TrainConfig, world: World, device: torch.device) -> Shards | None:
        """The shards of a run; None where each process holds the whole model."""
        wanted, tensor = config.parallel.shard, config.parallel.tensor
        alone = wanted == 1 or (wanted == "all" and world.size == 1)
        return None if alone and tensor == 1 else cls(config, world, device)

    @staticmethod
    def check(config: TrainConfig, shape: DecoderConfig) -> None:
        """Refuses a model whose layers so many processes cannot divide.

        Raises:
            UsageError: it is one.
        """
        if config.parallel.tensor > 1:
            Division.check(shape, config.parallel.tensor)

    def fill(self, model: Decoder, precision: Precision, folder: Path | str | None) -> Decoder:
        """Gives ``model``, which is prepared and on the meta device, its weights: those in a model folder, or initial
        ones. All processes call this. Returns the model, or this process's share of it."""
        config = self._config
        source = source_of(model, folder, config.seed)
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        self.parameters, self._owners = sum(sizes.values()), shared_out(sizes, self._world.size)
        self._complete = model
        if self._meshes.together is not None:
            self._division = Division(model, self._meshes.together)
            model = self._division.model
        fill(model, self._meshes, self._device, precision, source, config.seed, config.tuner.adds, self._division)
        self.model, self._parameters = model, dict(model.named_parameters())
        return model

    # What the others have.

    def settle(self, gradients: Mapping[str, Tensor]) -> None:
        """Makes gradients those of the whole batch, in place, after the backward passes. All processes call this."""
        if self._division is not None:
            self._division.settle(gradients)

    def total_norm(self, tensors: Mapping[str, Tensor], order: float = 2.0) -> Tensor:
        """The norm of the named parameters together, or of as many numbers for each; the same in all processes, which
        all call this."""
        if self._division is not None:
            return self._division.total_norm(tensors, order)
        return total_norm(list(tensors.values()), order)

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """All numbers of the parameter ``name``, or of what is kept of it, in every process. All call this."""
        return whole(tensor) if self._division is None else self._division.whole(name, tensor)

    def own(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Of whole ``tensors``, by the name of their parameter, perhaps with ``/key`` after it, this process's shares;
        their rows are not sharded yet."""
        return tensors if self._division is None else OwnParts(tensors, self._division)

    def shared_out(self, objective: Objective) -> Objective:
        """``objective`` with a loss that those who compute each layer together find together."""
        together = self._meshes.together
        return objective if together is None else shared_out_loss(objective, together)

    def compile(self) -> None:
        """Compiles the layers, from their next pass on; what is put together and let go of stays outside."""
        compile_layers(self.model, self._config.activation_checkpointing)

    def use_eager(self) -> None:
        """Undoes :meth:`compile`."""
        run_layers(self.model, self._config.activation_checkpointing)

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Within the block all processes compute with the model, the same at the same time, without gradients."""
        with self._world.blaming():
            yield
            reshard(self.model)

    # What is written.

    def checkpoint(
        self, folder: Path, step: int, tokenizer: Path, state: TrainerState, keeping: Keeping, dtype: torch.dtype
    ) -> Callable[[], None]:
        """What writes this process's part of the checkpoint of ``step``, from copies of this moment. All processes call
        this, and then what it returns; arguments as of :func:`penstock.train.checkpoint.save`, of whose state each
        process has some rows; ``dtype`` is that of the weights."""
        weights = self._weights(dtype)
        groups = {group: self._collected(tensors) for group, tensors in state.tensors.items()}
        described = TrainerState(copy.deepcopy(state.position), state.description, {group: {} for group in groups})
        shared = SharedFolder(folder / f"step-{step:08}", self._world)
        rank, size = self._world.rank, self._world.size

        def own(place: Path) -> list[Path]:
            files = self._save_part(place, weights)
            for group, tensors in groups.items():
                if tensors:
                    files.append(place / checkpoint.TRAINER / f"{group}-{rank + 1:05}-of-{size:05}.safetensors")
                    checkpoint.write_tensors(files[-1], tensors)
            return files

        def last(place: Path, entries: dict[str, Entry]) -> None:
            self._save_rest(place, tokenizer, dtype)
            checkpoint.complete(place, described, entries)

        def write() -> None:
            shared.write(own, last)
            if self._world.leads:
                checkpoint.prune(folder, step, keeping)

        return write

    def export(self, target: Path, tokenizer: Path, dtype: torch.dtype) -> None:
        """Writes the model into the new folder ``target``, with ``tokenizer`` beside it. All processes call this."""
        weights, shared = self._weights(dtype), SharedFolder(target, self._world)
        shared.write(
            lambda place: self._save_part(place, weights), lambda place, _: self._save_rest(place, tokenizer, dtype)
        )

    def _save_part(self, place: Path, weights: Mapping[str, Tensor]) -> list[Path]:
        return hub.save_part(self._complete, place, weights, self._world.rank, self._world.size)

    def _save_rest(self, place: Path, tokenizer: Path, dtype: torch.dtype) -> None:
        hub.save_rest(self._complete, place, self._owners, self._world.size, dtype)
        copy_companions(tokenizer, place)

    def _weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Those of a plain model that this process owns, whole: where something was added, with both merged."""
        with without_weights():
            plain = [name for name, _ in Decoder(self.model.config).named_parameters()]
        layers = {f"{name}.weight": layer for name, layer in low_rank.attached(self.model)}
        mine: dict[str, Tensor] = {}
        for name in plain:
            weight = self.whole(name, self._parameters[name])
            if self._owners[name] == self._world.rank:
                merged = layers[name].merged(weight) if name in layers else weight
                mine[name] = copied(merged.to(dtype))
        return mine

    def _collected(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of ``tensors`` that this process owns, whole, by the name of their parameter, perhaps with ``/key``
        after it."""
        mine: dict[str, Tensor] = {}
        for name in sorted(tensors):
            parameter = name.split("/")[0]
            value = self.whole(parameter, tensors[name])
            if self._owners[parameter] == self._world.rank:
                mine[name] = copied(value)
        return mine


def shared_out(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """A rank for each name, so that their sizes add up to about the same: the largest first, to whoever has least."""
    loads = [0] * ranks
    owners: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = min(range(ranks), key=lambda rank: loads[rank])
        loads[owners[name]] += sizes[name]
    return owners
