"""Steps in a file: recorded as an engine computes them, and computed again.

A recording has a header, then a frame for each step and one for what came out of it. A frame is its length (eight
bytes, little-endian) and a safetensors file; what is no array stands in its metadata as JSON. Nothing of the text has
to be known to compute steps again: a token that was not known to the host is looked up on the device, as it was then.
So a recording can also be replayed with other weights, to see how long the same steps take.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import struct
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from penstock.core.errors import UsageError
from penstock.ops.paged.contract import PagedBatch
from penstock.policy import create
from penstock.serve.choose.asked import SLOT, Asked, Masked, Ruled, Scattered
from penstock.serve.choose.sampler import Sampled
from penstock.serve.decode.contract import DecodeRule
from penstock.serve.engine.batch import Batch
from penstock.serve.kv.compaction import Compaction
from penstock.serve.run.copies import Copied
from penstock.serve.run.runner import Runner
from penstock.serve.run.step import Part, Placed, Step, Superposed

_LENGTH = struct.Struct("<Q")

#: A recording whose format is another cannot be read.
FORMAT = 6

#: What is written of a part, and of its plan.
OWN = ("inputs", "scored", "prompt_logprobs", "draws")
PLAN = ("starts", "lengths", "tables", "slots", "parents", "watched", "packed", "given", "rings", "since")

#: Steps after which the outcome of one is there without waiting for the device: an engine has at most two under way.
PATIENCE = 2

Arrays = dict[str, np.ndarray]


class Recorder:
    """An executor that passes batches on to ``runner``, and writes each step to ``path``.

    Args:
        header: what is to be known of the engine; see :func:`read_header`.
    """

    def __init__(self, runner: Runner, path: Path, header: dict[str, Any]) -> None:
        self._runner, self._file = runner, path.open("wb")
        self.shape, self.device = runner.shape, runner.device
        self.blocks, self.block_size, self.memory = runner.blocks, runner.block_size, runner.memory
        self._pending: deque[Sampled | None] = deque()
        self._write({}, {"format": FORMAT, **header})

    def launch(self, batch: Batch) -> Sampled | None:
        step = self._runner.plan(batch)
        self._write(*flatten(step))
        sampled = self._runner.execute(step)
        self._pending.append(sampled)
        while len(self._pending) > PATIENCE:
            self._tell(self._pending.popleft())
        return sampled

    @property
    def compress_seconds(self) -> float:
        return self._runner.compress_seconds

    def close(self) -> None:
        while self._pending:
            self._tell(self._pending.popleft())
        self._file.close()
        self._runner.close()

    def _tell(self, sampled: Sampled | None) -> None:
        tokens = np.zeros(0, np.int64)
        if sampled is not None:
            sampled.wait()
            tokens = sampled.tokens.cpu().numpy()
        self._write({"tokens": tokens}, {})

    def _write(self, arrays: Arrays, more: dict[str, Any]) -> None:
        body = _encoded(arrays, more)
        self._file.write(_LENGTH.pack(len(body)) + body)
        self._file.flush()


def read_header(path: Path) -> dict[str, Any]:
    """What was written of the engine: its ``model`` (a DecoderConfig), the ``source`` that it was loaded from, and the
    ``engine``'s options (an EngineConfig).

    Raises:
        UsageError: this is no recording.
    """
    try:
        with path.open("rb") as file:
            _, header = next(_frames(file, path), ({}, {}))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if header.get("format") != FORMAT:
        raise UsageError(f"{path} is no recording of steps in the format {FORMAT}")
    return header


def read_steps(path: Path) -> Iterator[tuple[Step, np.ndarray | None]]:
    """The steps of a recording, each with the tokens int64 [R] that came out of it; None where the engine was ended
    before they were known. A frame that was cut off ends it."""
    with path.open("rb") as file:
        frames = _frames(file, path)
        next(frames, None)
        waiting: deque[Step] = deque()
        for arrays, more in frames:
            if "lead" in more:
                waiting.append(unflatten(arrays, more))
            else:
                yield waiting.popleft(), arrays["tokens"]
    while waiting:
        yield waiting.popleft(), None


def _frames(file: BinaryIO, path: Path) -> Iterator[tuple[Arrays, dict[str, Any]]]:
    while len(length := file.read(_LENGTH.size)) == _LENGTH.size:
        (size,) = _LENGTH.unpack(length)
        body = file.read(min(size, path.stat().st_size))
        if len(body) < size:
            return
        with contextlib.suppress(SafetensorError, ValueError, KeyError):
            yield _decoded(body)
            continue
        return


def _encoded(arrays: Arrays, more: dict[str, Any]) -> bytes:
    whole = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    body: bytes = save(whole, {"more": json.dumps(more)})
    return body


def _decoded(body: bytes) -> tuple[Arrays, dict[str, Any]]:
    start = int.from_bytes(body[:8], "little")
    return load(body), json.loads(json.loads(body[8 : 8 + start])["__metadata__"]["more"])


def encoded(step: Step) -> bytes:
    """``step`` as bytes, as a recording has it."""
    return _encoded(*flatten(step))


def decoded(body: bytes) -> Step:
    """The step of :func:`encoded`."""
    return unflatten(*_decoded(body))


def flatten(step: Step) -> tuple[Arrays, dict[str, Any]]:
    """``step`` as named arrays, and what is none."""
    asked = step.asked
    arrays: Arrays = {"copies": step.copies, "prompt_logprobs": step.prompt_logprobs}
    for number, work in enumerate(step.compactions):
        arrays |= {f"compaction.{number}.sources": work.sources, f"compaction.{number}.targets": work.targets}
    for number, placed in enumerate(step.placed):
        arrays[f"placed.{number}"] = placed.tokens
    for number, part in enumerate(step.parts):
        own = {name: getattr(part, name) for name in OWN}
        if part.adapters is not None:
            own["adapters"] = part.adapters
        if part.copied is not None:
            own |= {f"copied.{name}": values for name, values in vars(part.copied).items()}
        if part.superposed is not None:
            own |= {f"superposed.{name}": values for name, values in vars(part.superposed).items()}
        plan = {name: values.numpy() for name in PLAN if (values := getattr(part.plan, name)) is not None}
        arrays |= {f"part.{number}.{name}": values for name, values in {**own, **plan}.items()}
    plain = ("first", "slots", "counts", "uniform", "bans", "followers", "window", "parents")
    arrays |= {f"asked.{name}": values for name in plain if (values := getattr(asked, name)) is not None}
    arrays["asked.rows"] = asked.rows.view(np.uint8).reshape(len(asked.rows), SLOT.itemsize)
    for name, record in (("biases", asked.biases), ("masks", asked.masks)):
        if record is not None:
            arrays |= {f"asked.{name}.{each}": values for each, values in vars(record).items()}
    for number, ruled in enumerate(asked.rules):
        arrays[f"rule.{number}"] = ruled.rows
        arrays |= {f"rule.{number}.{name}": values for name, values in ruled.known.items()}
    more = {
        "lead": step.lead,
        "alternatives": step.alternatives,
        "compactions": [[work.slot, work.computed, work.known, work.packed] for work in step.compactions],
        "parts": len(step.parts),
        "placed": [[placed.slot, placed.prompt] for placed in step.placed],
        "rules": [[ruled.rule.describe(), sorted(ruled.known)] for ruled in asked.rules],
    }
    return arrays, more


def unflatten(arrays: Arrays, more: dict[str, Any]) -> Step:
    """The step of :func:`flatten`."""

    def part(number: int) -> Part:
        own = {name: arrays[f"part.{number}.{name}"] for name in OWN}
        names = [name for name in PLAN if f"part.{number}.{name}" in arrays]
        plan: dict[str, Any] = {name: torch.from_numpy(arrays[f"part.{number}.{name}"]) for name in names}
        adapters = arrays.get(f"part.{number}.adapters")
        copied = record(Copied, f"part.{number}.copied")
        superposed = record(Superposed, f"part.{number}.superposed")
        return Part(plan=PagedBatch(**plan), copied=copied, adapters=adapters, superposed=superposed, **own)

    def compaction(number: int, known: list[int]) -> Compaction:
        slot, computed, first, packed = known
        places = (arrays[f"compaction.{number}.{name}"] for name in ("sources", "targets"))
        return Compaction(slot, computed, first, packed, *places)

    def record(kind: type[Any], name: str) -> Any:
        names = [f"{name}.{field.name}" for field in dataclasses.fields(kind)]
        return kind(*(arrays[each] for each in names)) if names[0] in arrays else None

    def ruled(number: int, described: dict[str, Any], known: list[str]) -> Ruled:
        options = {key: value for key, value in described.items() if key != "name"}
        rule = create("decode.rule", described["name"], **options)
        assert isinstance(rule, DecodeRule)
        return Ruled(rule, arrays[f"rule.{number}"], {name: arrays[f"rule.{number}.{name}"] for name in known})

    plain: dict[str, Any] = {
        name: arrays.get(f"asked.{name}")
        for name in ("first", "slots", "counts", "uniform", "bans", "followers", "window", "parents")
    }
    asked = Asked(
        rows=np.ascontiguousarray(arrays["asked.rows"]).view(SLOT).reshape(-1),
        biases=record(Scattered, "asked.biases"),
        masks=record(Masked, "asked.masks"),
        rules=tuple(ruled(number, *each) for number, each in enumerate(more["rules"])),
        **plain,
    )
    placed = (Placed(slot, arrays[f"placed.{number}"], prompt) for number, (slot, prompt) in enumerate(more["placed"]))
    parts = tuple(part(number) for number in range(more["parts"]))
    return Step(
        compactions=tuple(compaction(number, known) for number, known in enumerate(more["compactions"])),
        copies=arrays["copies"],
        placed=tuple(placed),
        parts=parts,
        lead=more["lead"],
        asked=asked,
        prompt_logprobs=arrays["prompt_logprobs"],
        alternatives=more["alternatives"],
    )
