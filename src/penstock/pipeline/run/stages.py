"""A Decoder cut into the stages of a pipeline.

A stage is a range of layers. Where the path of a microbatch begins, a stage begins with the embedding; where one ends,
it ends with the norm, the head and the loss. A device holds a :class:`Part`: the layers of all its stages, under the
names that they have in the whole Decoder; where the vocabulary is sharded, also some rows of both of its matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from penstock.core.errors import UsageError
from penstock.models.attention import AttentionContext
from penstock.models.blank import without_weights
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder, Layer, Output
from penstock.models.linear import Linear
from penstock.models.norms import norm
from penstock.models.rotary import Rotaries
from penstock.pipeline.ir.schedule import Schedule

#: The matrices of which each device holds some rows where the vocabulary is sharded.
SHARDED = ("embedding.weight", "head.weight")


class Stage(NamedTuple):
    """What a stage consists of.

    Attributes:
        layers: may be none, for a stage that is the embedding or the head alone.
        begins, ends: whether it has the embedding; the norm and the head.
    """

    layers: range
    begins: bool
    ends: bool


def stages_of(schedule: Schedule, cut: Sequence[range]) -> list[Stage]:
    """The stages of a schedule whose layers are ``cut``: several have the embedding, or the head, where microbatches
    begin or end their paths at several."""
    return [
        Stage(layers, stage in schedule.entrances, stage in schedule.exits)
        for stage, layers in zip(range(schedule.stages), cut, strict=True)
    ]


class Part(Decoder):
    """What one device holds of a Decoder: the layers of its stages, and the embedding and the head with their stages.

    Parameters have the names of the whole Decoder, so that optimizer state and checkpoints do not depend on the cut;
    stages of one device share what both use. A tied embedding is with the stages that begin and with those that end:
    where these are on different devices, whoever trains must sum its gradients. Built under ``without_weights()`` it
    takes no memory; :meth:`initialize` draws the same weights as in the whole Decoder.

    Args:
        config: of the whole Decoder.
        stages: those of this device.
        rows: of a sharded vocabulary, which rows of :data:`SHARDED` are here, in place of whole matrices.
    """

    def __init__(self, config: DecoderConfig, stages: Sequence[Stage], rows: range | None = None) -> None:
        nn.Module.__init__(self)  # not the Decoder's, which would make all of it
        if rows is not None and (config.embedding_scale != 1 or config.learned_positions or config.logits_cap):
            raise UsageError(
                "a vocabulary is not sharded where the embedding is scaled, positions are learned or logits are capped",
                hint="Choose pipeline transforms without vocabulary parallelism.",
            )
        self.config, self.rows = config, rows
        self.stages = tuple(stages)
        held = {layer for stage in stages for layer in stage.layers}
        ends = any(stage.ends for stage in stages)
        embeds, predicts = (rows is not None or any(s.begins for s in stages)), (rows is not None or ends)
        vocabulary = config.vocabulary if rows is None else len(rows)
        if embeds or (predicts and config.tied):
            self.embedding = nn.Embedding(vocabulary, config.hidden)
        # Placeholders without parameters keep the numbers of those between.
        self.layers = nn.ModuleList(Layer(config, i) if i in held else nn.Identity() for i in range(config.layers))
        if config.learned_positions and any(stage.begins for stage in stages):
            self.position_embedding = nn.Embedding(config.context, config.hidden)
        if ends:
            self.norm = norm(config)
        if predicts:
            self.head = Linear(config.hidden, vocabulary, bias=False)
            if config.tied:
                self.head.weight = self.embedding.weight
        self.rotary = Rotaries(config, config.context)

    def forward(self, tokens: Tensor, context: AttentionContext) -> Output:
        """Refused: a part is run stage by stage, with :meth:`run`.

        Raises:
            UsageError: always.
        """
        raise UsageError("a part of a Decoder has no forward pass of its own", hint="Run its stages.")

    def run(self, layers: range, x: Tensor, context: AttentionContext, *, last: bool) -> Output:
        """The layers of one stage.

        Args:
            layers: of one of :attr:`stages`.
            x: tokens, integers [*T], where a path begins; hidden states [*T, hidden] elsewhere, and at the beginning
                where the embedding is sharded over all devices.
            context: as for the whole Decoder.
            last: whether the path ends here.

        Returns:
            Hidden states [*T, hidden], after the last norm where the path ends, and the summed balance loss of the
            stage's own sparse layers.
        """
        if not x.is_floating_point():
            x = self.embed(x, context.positions)
        rotary = self.rotary(context.positions, x.dtype)
        balance: Tensor | None = None
        for layer in layers:
            x, extra = self.layers[layer](x, rotary, context)
            if extra is not None:
                balance = extra if balance is None else balance + extra
        return Output(self.finish(x) if last else x, balance)

    def own(self, name: str, whole: Tensor) -> Tensor:
        """What of ``whole``, which belongs to the parameter ``name`` of the whole Decoder, is this part's: its rows,
        where they are sharded; a scalar is everybody's."""
        if self.rows is None or name not in SHARDED or not whole.dim():
            return whole
        return whole[self.rows.start : self.rows.stop]

    def _drawn(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        if self.rows is not None and name in SHARDED:
            shape = torch.Size((self.config.vocabulary, self.config.hidden))
        return self.own(name, super()._drawn(name, shape, seed))

    @torch.no_grad()
    def take(self, whole: Decoder) -> Part:
        """Copies its weights from a whole Decoder of the same shape, into its own memory and dtype; returns itself."""
        vars(self).update({key: value for key, value in vars(whole).items() if key == "origin"})  # models/hub/family.py
        source = dict(whole.named_parameters())
        for name, parameter in self.named_parameters():
            parameter.copy_(self.own(name, source[name]))
        return self


def parameter_names(config: DecoderConfig, stages: Sequence[Stage], *, sharded: bool = False) -> list[dict[str, bool]]:
    """The names of each stage's parameters, and whether they are trained; without those of a sharded vocabulary, which
    belong to no stage. Needs no memory."""
    with without_weights():
        parts = [Part(config, [stage]) for stage in stages]
    left_out = SHARDED if sharded else ()
    return [{n: p.requires_grad for n, p in part.named_parameters() if n not in left_out} for part in parts]
