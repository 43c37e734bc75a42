"""Where replicas compute: the devices of a host, or the cores of a processor, divided among them."""

from __future__ import annotations

import dataclasses
import os

import torch

from penstock.core.devices import pick
from penstock.core.errors import UsageError
from penstock.core.processor import cores
from penstock.serve.config import EngineConfig

#: The variables that tell a process which devices there are for it, and how many threads it may compute with.
DEVICES, THREADS = "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one replica computes: its engine's options, its device as it is called there, and variables of its
    process."""

    config: EngineConfig
    device: str
    environment: dict[str, str]


def places(config: EngineConfig, replicas: int, device: str) -> list[Place]:
    """A place for each of so many ``replicas``. On CUDA each has as many devices as it has ranks, and knows of no
    others; on the CPU, threads and memory are divided.

    Raises:
        UsageError: there are not enough devices or cores, or an option is for one engine only.
    """
    check(config, replicas)
    where = pick(device)
    if where.type != "cuda":
        most = cores().choice
        if replicas > most:
            raise UsageError(
                f"{replicas} replicas on the CPU need {replicas} cores, and there are {most}",
                hint=f"Set --replicas to {most} or fewer." if most > 1 else "Leave --replicas out.",
            )
        share = {THREADS: str(max(1, torch.get_num_threads() // replicas))}
        config = config.model_copy(update={"memory": config.memory / replicas})
        return [Place(_own(config, number, replicas), str(where), share) for number in range(replicas)]
    if where.index:
        raise UsageError(f"replicas take the first devices, and not {where}", hint="Leave the device out.")
    each, there = config.ranks, _visible()
    if len(there) < replicas * each:
        of = f" of {each} ranks" if each > 1 else ""
        raise UsageError(
            f"{replicas} replicas{of} need {replicas * each} devices, and there are {len(there)}",
            hint=f"Set --replicas to {len(there) // each} or fewer." if len(there) >= each else "Leave --replicas out.",
        )
    own = [",".join(there[number * each : (number + 1) * each]) for number in range(replicas)]
    return [Place(_own(config, number, replicas), "cuda", {DEVICES: ids}) for number, ids in enumerate(own)]


def check(config: EngineConfig, replicas: int) -> None:
    """Refuses options that are for one engine only, where there are several ``replicas``.

    Raises:
        UsageError: there is such an option.
    """
    if config.record is not None and replicas > 1:
        raise UsageError(
            "several replicas would record their steps into one file", hint="Leave out --record, or --replicas."
        )


def _visible() -> list[str]:
    """The devices that this process may use, as a process that it starts can be told."""
    count = torch.cuda.device_count()
    named = [each for each in os.environ.get(DEVICES, "").split(",") if each]
    return named[:count] if named else [str(number) for number in range(count)]


def _own(config: EngineConfig, number: int, replicas: int) -> EngineConfig:
    """Those options that differ: two processes cannot keep blocks in one folder."""
    if config.kv_disk is None:
        return config
    size = type(config.kv_disk_size)(config.kv_disk_size // replicas)
    return config.model_copy(update={"kv_disk": config.kv_disk / f"replica-{number}", "kv_disk_size": size})
