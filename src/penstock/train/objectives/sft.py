"""Supervised fine-tuning."""

from __future__ import annotations

from typing import ClassVar

from penstock.data.chats.examples import Kind
from penstock.data.chats.template import Learnt
from penstock.policy import policy
from penstock.train.objectives.next_token import NextToken


@policy("train.objective", "sft")
class SupervisedFineTuning(NextToken):
    """Cross-entropy of what the assistant says in conversations (``data.chats``), its end token included.

    ``learnt`` are all ``answers``, the ``last`` one of each conversation, or ``all`` tokens; the others are read, and
    not predicted.
    """

    learns_from: ClassVar[Kind] = "chats"

    learnt: Learnt = "answers"
