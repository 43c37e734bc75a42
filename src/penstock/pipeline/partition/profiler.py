"""PipeDream's profiler: what each layer of a Decoder takes on one device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from penstock.core.devices import synchronize
from penstock.core.progress import Reporter, silent
from penstock.core.randomness import torch_generator
from penstock.models.attention import CausalRows
from penstock.models.config import DecoderConfig
from penstock.ops.cross_entropy import linear_cross_entropy
from penstock.pipeline.partition.pipedream import Layer
from penstock.pipeline.run.stages import Part, Stage

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
            lambda x: linear_cross_entropy(part.norm(x).flatten(0, 1), head, tokens.flatten()),
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
