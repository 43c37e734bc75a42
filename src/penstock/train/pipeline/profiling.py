"""What the first updates of a run took: of each stage, of each layer by itself, and on each way between two devices.

It is written to ``pipeline.json``, which the commands of ``penstock pipeline`` read as ``--costs``.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from penstock.core.devices import synchronize
from penstock.data.loader import Batch
from penstock.models.attention import CausalRows, PackedRows
from penstock.models.decoder import Decoder, Layer, MixtureOfExperts
from penstock.pipeline.ir.schedule import Kind
from penstock.pipeline.run.split_backward import Deferral
from penstock.pipeline.run.stages import Part
from penstock.pipeline.simulate.simulator import Simulation, simulate
from penstock.pipeline.simulate.times import Piece, Times, Way

#: Passes of each piece: the first warms up, and the median of the others counts.
PASSES = 4

#: What a piece of a model makes of hidden states: tensors to differentiate.
_Run = Callable[[Tensor], Sequence[Tensor]]


def alone(run: _Run, x: Tensor, arithmetic: AbstractContextManager[object], *, split: bool) -> list[float]:
    """Seconds of one forward pass of ``run`` from ``x``, which needs a gradient, and of its backward pass: B, or, where
    that is ``split``, I and W. Adds to the gradients of the weights."""
    deferral = Deferral() if split else None
    times = [_now(x.device)]
    with contextlib.nullcontext() if deferral is None else deferral, arithmetic:
        roots = [root for root in run(x) if root.requires_grad]
    times.append(_now(x.device))
    torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
    times.append(_now(x.device))
    if deferral is not None:
        deferral.run()
        times.append(_now(x.device))
    return [end - start for start, end in itertools.pairwise(times)]


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


def pieces_here(
    part: Part,
    batch: Batch,
    context: CausalRows | PackedRows,
    loss: Callable[[Decoder, Tensor, Batch], Tensor],
    arithmetic: Callable[[], AbstractContextManager[object]],
) -> dict[int, list[float]]:
    """Seconds of F, I and W of each piece of ``part`` by itself, on one microbatch: 0 is the embedding, and after the
    layers comes the head. Leaves neither gradients nor counts of experts."""
    dtype, device = next(part.parameters()).dtype, batch.tokens.device
    hidden = torch.randn(*batch.tokens.shape, part.config.hidden, dtype=dtype, device=device)
    last = part.config.layers
    runs: dict[int, _Run] = {}
    if part.rows is None and any(stage.begins for stage in part.stages):
        runs[0] = lambda _: [part.embedding(batch.tokens)]
    for stage in part.stages:
        for number in stage.layers:
            runs[number + 1] = lambda x, own=range(number, number + 1): [  # type: ignore[misc]
                root for root in part.run(own, x, context, last=False) if root is not None
            ]
    if part.rows is None and any(stage.ends for stage in part.stages):
        runs[last + 1] = lambda x: [loss(part, part.norm(x), batch)]
    found = {}
    with _uncounted(part):
        for number, run in runs.items():
            passes = [alone(run, hidden.detach().requires_grad_(), arithmetic(), split=True) for _ in range(PASSES)]
            found[number] = [statistics.median(times) for times in zip(*passes[1:], strict=True)]
            part.zero_grad()
    return found


@contextlib.contextmanager
def _uncounted(part: Part) -> Iterator[None]:
    """Passes in the ``with`` block add nothing to the counts of experts."""
    blocks = [layer.mlp for layer in part.layers if isinstance(layer, Layer)]
    sparse = [block for block in blocks if isinstance(block, MixtureOfExperts)]
    counts = [block.counts for block in sparse]
    for block in sparse:
        block.counts = None
    try:
        yield
    finally:
        for block, counted in zip(sparse, counts, strict=True):
            block.counts = counted


def halves_of(ranges: Sequence[range], pieces: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """I and W of each stage of layers ``ranges``, from those of its pieces."""
    found = []
    for number, own in enumerate(ranges):
        first = own.start if number == 0 else own.start + 1
        stop = own.stop + 2 if number == len(ranges) - 1 else own.stop + 1
        found.append((sum(piece[1] for piece in pieces[first:stop]), sum(piece[2] for piece in pieces[first:stop])))
    return found


def times_of(
    real: Simulation, ranges: Sequence[range], pieces: Sequence[Sequence[float]], weights: Sequence[float]
) -> Times:
    """What was measured of a step, as the commands of ``penstock pipeline`` read it.

    Pieces by themselves say how a stage's time divides among them; what they add up to is what the stage took in the
    step.

    Args:
        real: the step.
        ranges: the layers of its stages.
        pieces: see :func:`pieces_here`; of all devices. None where they were not measured.
        weights: bytes of each piece's.
    """
    costs = real.costs
    # A product with the whole matrix of the vocabulary: three of them are in the passes of all shards.
    product = real.schedule.devices * sum(costs.shards.get(kind, 0.0) for kind in (Kind.S, Kind.N, Kind.T)) / 3
    return Times(
        forward=costs.forward,
        input_grad=costs.input_grad,
        weight_grad=costs.weight_grad,
        pieces=_scaled(real, ranges, pieces, weights) if pieces else (),
        transfer=costs.link.latency,
        ways=tuple(
            Way(source=source, target=target, seconds=link.latency) for (source, target), link in costs.links.items()
        ),
        host=host_seconds(real),
        output=product,
    )


def _scaled(
    real: Simulation, ranges: Sequence[range], pieces: Sequence[Sequence[float]], weights: Sequence[float]
) -> tuple[Piece, ...]:
    found: list[Piece] = []
    for stage, own in enumerate(ranges):
        numbers = list(range(own.start + 1, own.stop + 1))
        numbers = ([0] if stage == 0 else []) + numbers + ([len(pieces) - 1] if stage == len(ranges) - 1 else [])
        whole = [real.costs.forward[stage], real.costs.input_grad[stage], real.costs.weight_grad[stage]]
        sums = [sum(pieces[number][kind] for number in numbers) for kind in range(3)]
        for number in numbers:
            shares = [whole[k] * pieces[number][k] / sums[k] if sums[k] else whole[k] / len(numbers) for k in range(3)]
            found.append(Piece(forward=shares[0], input_grad=shares[1], weight_grad=shares[2], weights=weights[number]))
    return tuple(found)


def host_seconds(real: Simulation) -> float:
    """Of the activation of a microbatch on a p-th of the model, on its way to the host."""
    return sum(map(real.costs.host.seconds, real.costs.activation)) / real.schedule.devices


def described(real: Simulation, ranges: Sequence[range], times: Times) -> dict[str, Any]:
    """The profile as plain data, without the names of its policies."""
    costs, schedule = real.costs, real.schedule
    share = sum(costs.forward), sum(costs.input_grad), sum(costs.weight_grad)
    f, i, w = (f"{seconds / schedule.devices:.6g}" for seconds in share)
    return {
        "devices": schedule.devices,
        "microbatches": schedule.microbatches,
        "layers": [[own.start, own.stop] for own in ranges],
        "times": times.model_dump(mode="json"),
        "activation_bytes": costs.activation,
        "weight_bytes": costs.weights,
        "message_bytes": costs.message,
        "host_bandwidth": costs.host.bandwidth,
        "makespan": {"measured": real.makespan, "simulated": simulate(schedule, costs).makespan},
        "cost": f"F={f},I={i},W={w},comm={costs.link.latency:.6g},host={times.host:.6g}",
    }
