"""A Decoder cut into the stages of a pipeline.

A stage is a range of layers. The first begins with the embedding; the last ends with the norm, the head and the loss.
A device holds a :class:`Part`: the layers of all its stages, under the names that they have in the whole Decoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from penstock.core.errors import UsageError
from penstock.models.attention import AttentionContext
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder, Layer, Linear, Output, RMSNorm
from penstock.models.rotary import Rotary


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
