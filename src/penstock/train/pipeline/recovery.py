"""What the processes of a pipeline leave when one of them is lost, and the checkpoint that is made of it.

On a route whose stages can be made anew from each other, nothing needs to be saved while all is well. When a process is
lost, each of the others writes what it holds, and ends. The run goes on from there, however old its newest checkpoint
is: what the lost process alone had is averaged from its neighbours, weighted by the norms of their last gradients. One
survivor may be an update ahead of another; the run goes on at the place of the one that is not.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from penstock.core.config import Config
from penstock.core.files import write_atomic
from penstock.models.blank import without_weights
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.pipeline.routes.contract import PipelineRoute

#: The folder of a run in which the survivors leave what they hold.
FOLDER = "survivors"


class Left(Config):
    """What a survivor says of itself.

    Attributes:
        stages: the layers of all stages of its pipeline, first and end.
        stage: its own.
        norm: of the last gradient of its own layers.
        position: see :class:`~penstock.train.report.Position`.
        description: see :class:`~penstock.train.checkpoint.TrainerState`.
    """

    stages: tuple[tuple[int, int], ...]
    stage: int
    norm: float
    position: dict[str, Any]
    description: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Recovered:
    """A whole that was put together.

    Attributes:
        weights: of the model, by name.
        groups: of :class:`~penstock.train.checkpoint.TrainerState`.
        position, description: of the survivor that was least far.
        note: what the user should know of it.
    """

    weights: dict[str, Tensor]
    groups: dict[str, dict[str, Tensor]]
    position: dict[str, Any]
    description: dict[str, Any]
    note: str


def leave(folder: Path, rank: int, left: Left, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Writes what the process ``rank`` of the run in ``folder`` holds: tensors by group and by name.

    Raises:
        PenstockError: the disk is full or not writable.
    """
    tensors = {
        f"{group}/{name}": tensor.detach().cpu().contiguous()
        for group, named in groups.items()
        for name, tensor in named.items()
    }
    (folder / FOLDER).mkdir(exist_ok=True)
    data = safetensors.torch.save(tensors, {"left": left.model_dump_json()})
    write_atomic(folder / FOLDER / f"rank-{rank:05}.safetensors", data)


def forget(folder: Path) -> None:
    """Removes what survivors have left."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def recover(folder: Path, route: PipelineRoute, shape: DecoderConfig) -> Recovered | str | None:
    """What survivors have left in ``folder``, made whole; or why it cannot be; or None where there is nothing."""
    found = _read(folder / FOLDER)
    if not found:
        return None
    first = found[0][0]
    ranges = [range(start, stop) for start, stop in first.stages]
    here = {left.stage: (left, tensors) for left, tensors in found}
    lost = [stage for stage in range(len(ranges)) if stage not in here]
    whole: dict[str, Tensor] = {}
    for _, held in here.values():
        whole |= held
    for stage in lost:
        neighbours = route.neighbours(stage, len(ranges))
        missing = [source for source in neighbours if source in lost or len(ranges[source]) != len(ranges[stage])]
        if missing:
            return (
                f"stage {stage} was lost with its process, and stage {missing[0]}, from which it would be made anew, "
                "was too or has another number of layers"
            )
        shares = _shares([here[source][0].norm for source in neighbours])
        tensors = [here[source][1] for source in neighbours]
        whole |= _average(tensors, [ranges[source] for source in neighbours], shares, ranges[stage])
    with without_weights():
        names = set(dict(Decoder(shape).named_parameters()))
    if not names <= {name.removeprefix("model/") for name in whole if name.startswith("model/")}:
        return "the embedding or the head was lost with all processes that held it"
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in whole.items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = tensor
    least = min((left for left, _ in found), key=lambda left: left.position["step"])
    sources = {stage: " and ".join(map(str, route.neighbours(stage, len(ranges)))) for stage in lost}
    told = ", ".join(f"stage {stage} anew from {source}" for stage, source in sources.items())
    note = f"goes on after {least.position['step']} steps from what the processes held when one was lost"
    return Recovered(
        groups.pop("model"), groups, least.position, least.description, f"{note}: {told}" if told else note
    )


def _read(folder: Path) -> list[tuple[Left, dict[str, Tensor]]]:
    """What is whole of what was left; a damaged file counts as lost."""
    found = []
    for path in sorted(folder.glob("rank-*.safetensors")):
        try:
            with safetensors.safe_open(path, framework="pt") as opened:
                left = Left(**json.loads((opened.metadata() or {})["left"]))
                found.append((left, {name: opened.get_tensor(name) for name in opened.keys()}))  # noqa: SIM118
        except (safetensors.SafetensorError, KeyError, ValueError, OSError):
            continue
    return found


def _shares(norms: Sequence[float]) -> list[float]:
    total = sum(norms)
    return [norm / total if total else 1 / len(norms) for norm in norms]


def _average(
    sources: Sequence[Mapping[str, Tensor]], ranges: Sequence[range], shares: Sequence[float], own: range
) -> dict[str, Tensor]:
    """Tensors of the layers ``own`` from those in the same places of other stages; optimizer state begins anew."""
    found = {}
    for place, layer in enumerate(own):
        prefix = f"layers.{ranges[0][place]}."
        for name in sources[0]:
            group, _, inner = name.partition("/")
            if group == "optimizer" or not inner.startswith(prefix):
                continue
            parts = [
                share * tensors[f"{group}/layers.{own_range[place]}.{inner.removeprefix(prefix)}"]
                for share, tensors, own_range in zip(shares, sources, ranges, strict=True)
            ]
            found[f"{group}/layers.{layer}.{inner.removeprefix(prefix)}"] = torch.stack(parts).sum(0).to(parts[0].dtype)
    return found
