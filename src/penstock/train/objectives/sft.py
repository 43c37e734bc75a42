"""Supervised fine-tuning."""

from __future__ import annotations

from typing import ClassVar

from penstock.data.chats.examples import Kind
from penstock.data.chats.template import Learnt
from penstock.policy import policy
from penstock.train.objectives.next_token import NextToken


@policy("train.objective", "sft", papers=[458])
class SupervisedFineTuning(NextToken):
    """Cross-entropy of what the assistant says in conversations (``data.chats``), its end token included.

    ``learnt`` are all ``answers``, the ``last`` one of each conversation, or ``all`` tokens; the others are read, and
    not predicted.

    From the paper: one path from data to a served model, for every family of models, every tuner and every format of
    the base's weights, with one command to train, and others to serve, evaluate and quantize what the run leaves; each
    combination passes a round trip on a tiny random model. Ours: the forms of the data and the models' own templates
    for them, what is learnt, and how conversations are packed into rows. Not built: models of images and sound; the
    paper's registry of data sets; training of agents against a loss of their own.
    """

    learns_from: ClassVar[Kind] = "chats"

    learnt: Learnt = "answers"
