"""Distillation from a teacher."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from penstock.data.chats.examples import Kind
from penstock.data.chats.template import Learnt
from penstock.data.loader import Batch
from penstock.models.decoder import Decoder
from penstock.ops.cross_entropy import IGNORE
from penstock.policy import policy
from penstock.train.objectives.contract import Example, Objective, Teacher

#: What is left to other tokens counts from here on; float32 log-probabilities do not tell less.
LEAST = 1e-6


@policy("train.objective", "distill")
class Distill(Objective):
    """KL(p || q) from what a teacher says of each token of ``data.chats`` that is learnt, p, to what the model does, q
    (Hinton et al., 2015).

    Of the teacher its ``top`` most probable tokens are known; all others count as one more, with the probability that
    is left: a lower bound of the divergence, and with the whole vocabulary the divergence itself. They are asked once,
    before the run.

    Attributes:
        source: the teacher, which has the model's tokenizer: a model folder, or the address of a server, such as
            ``http://127.0.0.1:8000``, that tells ``prompt_logprobs`` (penstock, vLLM).
        top: how many of its tokens are known.
        learnt: as of ``sft``.
        chunk: how many tokens' logits exist at a time.
    """

    learns_from: ClassVar[Kind] = "chats"

    source: str = Field("", examples=["http://127.0.0.1:8000"])
    top: PositiveInt = 16
    learnt: Learnt = "answers"
    chunk: PositiveInt = 1024

    @property
    def teacher(self) -> Teacher:
        return Teacher(self.source, self.top)

    def hidden_loss(self, model: Decoder, hidden: Tensor, batch: Batch) -> Tensor:
        counts = (batch.targets != IGNORE).flatten()
        tokens, said = (batch.extras[f"teacher_{name}"].flatten(0, -2) for name in ("tokens", "logprobs"))
        whole = (hidden.flatten(0, -2), tokens.long(), said, counts)
        pieces = zip(*(torch.split(each, self.chunk) for each in whole), strict=True)
        return torch.stack([recompute(_divergence, model, *piece, use_reentrant=False) for piece in pieces]).sum()

    @classmethod
    def example(cls) -> Example:
        # The teacher says 1/2 and 1/8, and leaves 3/8 to the two others, of which the model thinks 1/8 and 3/8, and 1/4
        # of each of the first two: 1/2 log 2 + 1/8 log (1/2) + 3/8 log (3/4).
        scores = [[math.log(2), math.log(2), 0.0, math.log(3)], [1.0, 2.0, 3.0, 4.0]]
        logprobs = [[math.log(1 / 2), math.log(1 / 8)]] * 2
        known: dict[str, list[list[float]]] = {"teacher_tokens": [[0, 1], [2, 3]], "teacher_logprobs": logprobs}
        return Example(cls(), scores, [3, IGNORE], 0.375 * math.log(1.5), None, known)


def _divergence(model: Decoder, rows: Tensor, tokens: Tensor, said: Tensor, counts: Tensor) -> Tensor:
    """That of some hidden states [N, hidden], summed over the places that count, from a teacher's ``tokens`` [N, K] and
    what it ``said`` of them, log-probabilities [N, K]."""
    scores = model.logits(rows)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    normalizer = scores.logsumexp(-1, keepdim=True)
    said = said.to(scores.dtype)
    known = said.exp()
    each = (known * (said - (scores.gather(1, tokens) - normalizer))).sum(-1)
    if tokens.shape[1] < scores.shape[1]:
        left = (1 - known.sum(-1)).clamp(min=0)
        others = scores.scatter(1, tokens, -math.inf).logsumexp(-1) - normalizer.squeeze(-1)
        each = each + torch.where(left > LEAST, left * (left.clamp(min=LEAST).log() - others), 0.0)
    return (each * counts).sum()
