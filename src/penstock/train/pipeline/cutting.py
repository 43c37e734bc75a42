"""Which layers make which stage: counted, by hand, or from a partition that was measured."""

from __future__ import annotations

import itertools
from pathlib import Path

from penstock.core.config import build
from penstock.core.errors import ConfigError
from penstock.core.files import read_json
from penstock.models.config import DecoderConfig
from penstock.pipeline.ir.schedule import Schedule
from penstock.pipeline.partition.balanced import cut
from penstock.pipeline.partition.file import PartitionFile
from penstock.train.config import TrainConfig


def ranges_of(config: TrainConfig, shape: DecoderConfig, schedule: Schedule) -> list[range]:
    """The layers of each stage of ``schedule``.

    By ``pipeline.cuts`` or ``pipeline.partition`` where the configuration has them; on a route that recovers lost
    stages, in equal numbers; else balanced by counted FLOPs over ``pipeline.speeds``.

    Raises:
        ConfigError: they are for another number of stages or layers.
        UsageError: there are fewer layers than stages, or the file cannot be read.
    """
    pipeline, stages = config.pipeline, schedule.stages
    if pipeline.cuts is not None:
        return _by_hand(pipeline.cuts, shape.layers, stages)
    if pipeline.partition is not None:
        return _from_file(pipeline.partition, shape.layers, stages)
    if pipeline.route is not None and pipeline.route.recovers:
        return _even(pipeline.route.policy_name, shape.layers, stages)
    speeds = pipeline.speeds
    if speeds is None:
        return cut(shape, stages, config.batch.length)
    if len(speeds) != schedule.devices:
        raise ConfigError(
            f"pipeline.speeds has {len(speeds)} numbers, and a pipeline has {schedule.devices} devices",
            hint="Give one for each device, in the order of their ranks.",
        )
    return cut(shape, stages, config.batch.length, [min(speeds[d] for d in where) for where in schedule.placement])


def _by_hand(cuts: tuple[int, ...], layers: int, stages: int) -> list[range]:
    ends = [0, *cuts, layers]
    if len(ends) != stages + 1 or ends != sorted(ends):
        raise ConfigError(
            f"pipeline.cuts {list(cuts)} do not cut {layers} layers into the {stages} stages of this schedule",
            hint=f"Give {stages - 1} ascending numbers up to {layers}: the first layer of each stage but the first.",
        )
    return [range(start, stop) for start, stop in itertools.pairwise(ends)]


def _even(route: str, layers: int, stages: int) -> list[range]:
    if layers % stages:
        raise ConfigError(
            f"{route} makes a lost stage anew from its neighbours, and {layers} layers are no {stages} equal stages",
            hint=f"Use a number of layers that {stages} divides, or say pipeline.cuts: then only a stage whose "
            "neighbours have as many layers can be recovered.",
        )
    size = layers // stages
    return [range(stage * size, (stage + 1) * size) for stage in range(stages)]


def _from_file(path: Path, layers: int, stages: int) -> list[range]:
    """The stages of a partition, whose pieces are the embedding, the layers and the head."""
    found = build(PartitionFile, read_json(path), source=str(path))
    replicas = {stage.replicas for stage in found.stages}
    if len(replicas) > 1:
        counts = ", ".join(str(stage.replicas) for stage in found.stages)
        raise ConfigError(
            f"{path} has stages on {counts} devices, and pipelines have each stage as often as the others",
            hint="Make the partition again with --straight, which gives each stage one device.",
        )
    if len(found.stages) != stages or found.stages[-1].last != layers + 2:
        raise ConfigError(
            f"{path} cuts {found.stages[-1].last - 2} layers into {len(found.stages)} stages, and this schedule has "
            f"{stages}, for {layers} layers",
            hint="Make the partition for this model and schedule: penstock pipeline partition MODEL --stages "
            f"{stages} --straight --out {path}",
        )
    ends = [min(max(stage.last - 1, 0), layers) for stage in found.stages]
    return [range(start, stop) for start, stop in itertools.pairwise([0, *ends])]
