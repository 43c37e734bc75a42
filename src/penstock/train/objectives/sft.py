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

    From the paper: one path for many models and ways of tuning, from data by training to inference, evaluation and
    quantization. Ours: the forms of the data and the models' own templates for them, what is learnt, how conversations
    are packed into rows, and a round trip on tiny random models for every family, tuner and format of the base, but of
    four bits for one family alone. Not built: models of images and sound; a benchmark that compares ways of tuning;
    fine-tuning for frameworks of agents.
    """

    learns_from: ClassVar[Kind] = "chats"

    learnt: Learnt = "answers"
