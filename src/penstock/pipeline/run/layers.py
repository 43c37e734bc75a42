"""What each layer of a Decoder takes by itself: PipeDream's profiler on this machine, or a run's own profile."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from penstock.core.config import Config, build
from penstock.core.devices import synchronize
from penstock.core.errors import UsageError
from penstock.core.files import read_json
from penstock.core.progress import Reporter, silent
from penstock.core.randomness import torch_generator
from penstock.models.attention import CausalRows
from penstock.models.config import DecoderConfig
from penstock.ops.cross_entropy import linear_cross_entropy
from penstock.pipeline.partition.pipedream import Layer
from penstock.pipeline.run.stages import Part, Stage
from penstock.pipeline.simulate.times import Times

#: Passes of each layer: the first warms up, and the median of the others counts.
PASSES = 4

#: A function of the activations that enter it, its parameters, and whether something follows.
_Piece = tuple[Callable[[Tensor], Tensor], Sequence[Tensor], bool]


def profile(
    config: DecoderConfig,
    rows: int,
    length: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    reporter: Reporter = silent,
) -> list[Layer]:
    """Runs forward and backward of each layer by itself, on a minibatch of ``rows`` sequences of ``length`` tokens.

    Args:
        config: of the Decoder; its weights are drawn, one layer at a time.
        rows, length: of the minibatch.
        device, dtype: of weights and activations.
        reporter: told of every layer.

    Returns:
        The embedding, the layers, and the head with the loss, in order.
    """
    context = CausalRows.of(length, device)
    tokens = torch.randint(config.vocabulary, (rows, length), generator=torch_generator(0, "profile")).to(device)
    x = torch.randn(rows, length, config.hidden, generator=torch_generator(0, "activations")).to(device, dtype)
    found = []
    with reporter("profiling", config.layers, "layer") as bar:
        for number in range(config.layers):
            part = Part(config, [Stage(range(number, number + 1), number == 0, number == config.layers - 1)])
            part.initialize(0).to(device, dtype)
            for run, parameters, hands_over in _pieces(part, number, tokens, context):
                weights = sum(p.numel() * p.element_size() for p in parameters)
                seconds = _seconds(run, x, parameters, device)
                found.append(Layer(seconds, float(x.nbytes if hands_over else 0), float(weights)))
            bar.advance()
    return found


def _pieces(part: Part, number: int, tokens: Tensor, context: CausalRows) -> Iterator[_Piece]:
    """A layer, and what comes before the first one and after the last."""
    if number == 0:
        yield lambda _: part.embedding(tokens), [part.embedding.weight], True
    rotary, layer = part.rotary(context.positions, next(part.parameters()).dtype), part.layers[number]
    yield lambda x: layer(x, rotary, context)[0], list(layer.parameters()), True
    if number == part.config.layers - 1:
        head = part.head.weight
        yield (
            lambda x: linear_cross_entropy(
                part.finish(x).flatten(0, 1), head, tokens.flatten(), cap=part.config.logits_cap
            ),
            [*part.norm.parameters(), head],
            False,
        )


def _seconds(run: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor], device: torch.device) -> float:
    """The median over some forward and backward passes."""
    times = []
    for _ in range(PASSES):
        for parameter in parameters:
            parameter.grad = None
        given = x.clone().requires_grad_()
        synchronize(device)
        began = time.perf_counter()
        out = run(given)
        torch.autograd.backward(out, torch.ones_like(out))
        synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


class _Profile(Config):
    """What of a run's ``pipeline.json`` a partition needs."""

    model_config = ConfigDict(extra="ignore")

    times: Times
    message_bytes: float = Field(ge=0)


def measured_layers(path: Path) -> tuple[list[Layer], float]:
    """The embedding, the layers and the head as a run measured them, and bytes a second between its devices.

    Raises:
        UsageError: the file does not say what single layers took.
    """
    profile = build(_Profile, read_json(path), source=str(path))
    pieces, message = profile.times.pieces, profile.message_bytes
    if not pieces:
        raise UsageError(
            f"{path} does not say what each layer took",
            hint="A run with activation_checkpointing does not measure it: name the model in place of --costs.",
        )
    handed = [message] * (len(pieces) - 1) + [0.0]
    layers = [Layer(p.seconds, activation, p.weights) for p, activation in zip(pieces, handed, strict=True)]
    transfer = profile.times.transfer
    return layers, message / transfer if transfer else math.inf
