"""A Decoder cut into the stages of a pipeline.

A stage is a range of layers. The first begins with the embedding; the last ends with the norm, the head and the loss.
A device holds a :class:`Part`: the layers of all its stages, under the names that they have in the whole Decoder.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from penstock.core.errors import UsageError
from penstock.models.attention import AttentionContext
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder, Layer, Linear, Output, RMSNorm
from penstock.models.rotary import Rotary


def balanced(costs: Sequence[float], stages: int, *, first: float = 0.0, last: float = 0.0) -> list[range]:
    """Cuts layers into contiguous stages of one layer or more whose most expensive one costs as little as possible.

    Exact, by dynamic programming. Of equally good cuts, the one whose last stages are smaller, since the head's loss
    comes on top of them.

    Args:
        costs: of each layer, in any unit.
        stages: S >= 1.
        first: what the first stage costs besides its layers: the embedding.
        last: what the last one does: norm, head and loss.

    Raises:
        UsageError: there are fewer layers than stages.
    """
    layers = len(costs)
    if not 1 <= stages <= layers:
        raise UsageError(
            f"{layers} layers cannot be cut into {stages} stages of one or more",
            hint=f"Use a schedule with 1 to {layers} stages in all, or a model with {max(stages, 1)} layers.",
        )
    before = [0.0, *itertools.accumulate(costs)]
    best = [first + cost for cost in before]  # best[n]: the most expensive of the stages so far, over the layers 0..n-1
    best[0] = math.inf
    starts: list[list[int]] = []
    for stage in range(1, stages):
        extra = last if stage == stages - 1 else 0.0
        chosen = [0] * (layers + 1)
        worst = [math.inf] * (layers + 1)
        for stop in range(stage + 1, layers + 1):
            worst[stop], negative = min(
                (max(best[start], before[stop] - before[start] + extra), -start) for start in range(stage, stop)
            )
            chosen[stop] = -negative
        best = worst
        starts.append(chosen)
    stops = [layers]
    for chosen in reversed(starts):
        stops.append(chosen[stops[-1]])
    return [range(start, stop) for start, stop in itertools.pairwise([0, *reversed(stops)])]


def counted_costs(config: DecoderConfig, length: int) -> tuple[list[float], float]:
    """Forward FLOPs for a token of each layer, and of the head, in sequences of ``length`` tokens.

    The embedding looks up rows and counts nothing.
    """
    totals = [
        config.model_copy(update={"layers": layers}).flops_per_token(length) for layers in range(config.layers + 1)
    ]
    return [after - before for before, after in itertools.pairwise(totals)], totals[0]


def cut(config: DecoderConfig, stages: int, length: int) -> list[range]:
    """The stages of a Decoder, balanced by counted FLOPs on sequences of ``length`` tokens. See :func:`balanced`."""
    costs, head = counted_costs(config, length)
    return balanced(costs, stages, last=head)


class Part(Decoder):
    """What one device holds of a Decoder: the layers of its stages, and the embedding and the head with their stages.

    Parameters have the names of the whole Decoder, so that optimizer state and checkpoints do not depend on the cut;
    stages of one device share what both use. A tied embedding is with the first stage and with the last one: where
    these are on different devices, whoever trains must sum its gradients. Built under ``torch.device("meta")`` it takes
    no memory; :meth:`initialize` draws the same weights as in the whole Decoder.

    Attributes:
        stages: the ranges of layers that are here.
    """

    def __init__(self, config: DecoderConfig, stages: Sequence[range]) -> None:
        nn.Module.__init__(self)  # not the Decoder's, which would make all of it
        self.config = config
        self.stages = tuple(stages)
        held = {layer for stage in stages for layer in stage}
        begins, ends = 0 in held, config.layers - 1 in held
        if begins or (ends and config.tied):
            self.embedding = nn.Embedding(config.vocabulary, config.hidden)
        # Placeholders without parameters keep the numbers of those between.
        self.layers = nn.ModuleList(Layer(config, i) if i in held else nn.Identity() for i in range(config.layers))
        if ends:
            self.norm = RMSNorm(config.hidden, config.norm_eps)
            self.head = Linear(config.hidden, config.vocabulary, bias=False)
            if config.tied:
                self.head.weight = self.embedding.weight
        self.rotary = Rotary(config)

    def forward(self, tokens: Tensor, context: AttentionContext) -> Output:
        """Refused: a part is run stage by stage, with :meth:`run`.

        Raises:
            UsageError: always.
        """
        raise UsageError("a part of a Decoder has no forward pass of its own", hint="Run its stages.")

    def run(self, stage: range, x: Tensor, context: AttentionContext) -> Output:
        """The layers of one stage.

        Args:
            stage: one of :attr:`stages`.
            x: tokens, integers [*T], for the first stage; hidden states [*T, hidden] for the others, and for the first
                one where the embedding is sharded over all devices.
            context: as for the whole Decoder.

        Returns:
            Hidden states [*T, hidden], after the last norm for the last stage, and the summed balance loss of the
            stage's own sparse layers.
        """
        if not x.is_floating_point():
            x = self.embedding(x)
        rotary = self.rotary(context.positions, x.dtype)
        balance: Tensor | None = None
        for layer in stage:
            x, extra = self.layers[layer](x, rotary, context)
            if extra is not None:
                balance = extra if balance is None else balance + extra
        return Output(self.norm(x) if stage.stop == self.config.layers else x, balance)

    @torch.no_grad()
    def take(self, whole: Decoder) -> Part:
        """Copies its weights from a whole Decoder of the same shape, into its own memory and dtype; returns itself."""
        vars(self).update({key: value for key, value in vars(whole).items() if key == "origin"})  # see models/hub.py
        source = dict(whole.named_parameters())
        for name, parameter in self.named_parameters():
            parameter.copy_(source[name])
        return self


def parameter_names(config: DecoderConfig, stages: Sequence[range]) -> list[dict[str, bool]]:
    """The names of each stage's parameters, and whether they are trained. Needs no memory."""
    with torch.device("meta"):
        parts = [Part(config, [stage]) for stage in stages]
    return [{name: p.requires_grad for name, p in part.named_parameters()} for part in parts]
