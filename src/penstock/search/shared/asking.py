"""Asking a model about a text: questions that stand behind it, and what is read off the replies."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from penstock.search.branch import Branch
from penstock.search.search import Search


def reopened(branch: Branch) -> Branch:
    """A fork of ``branch`` that goes on behind its text, without the token that ended it."""
    return branch.fork(1, at=len(branch.tokens) - branch.closed)[0]


def asked(branch: Branch, question: str, model: str = "") -> Branch:
    """A branch aside that begins behind ``question`` about the text of ``branch``. Another ``model`` than the branch's
    own is shown the problem and the text."""
    if model == branch.model:
        found = reopened(branch).ask(question)
    else:
        found = branch.search.root_of(model).fork(1)[0].ask(branch.text + question)
    found.fate = "aside"
    return found


async def chances(search: Search, questions: Sequence[Branch], yes: str, no: str) -> list[float]:
    """The chance of ``yes`` against ``no`` as the next token behind each of the ``questions``, for the price of one
    token each; 1/2 where neither is among the 20 most probable tokens."""
    await search.extend(questions, tokens=1, top=20)
    found = []
    for question in questions:
        top = question.alternatives.get(question.prompt, [])
        one, other = (_mass(question, top, word) for word in (yes, no))
        found.append(one / (one + other) if one + other else 0.5)
        question.drop()
    return found


def _mass(branch: Branch, top: Sequence[tuple[int, float]], word: str) -> float:
    """The probability of tokens that begin ``word``."""
    read = [(branch.texts.decode([token]).strip().lower(), logprob) for token, logprob in top]
    return sum(math.exp(logprob) for text, logprob in read if text and word.lower().startswith(text))


def said(text: str, yes: str, no: str) -> bool | None:
    """Whether ``yes`` or ``no`` comes last in ``text``, as a word; None where neither does."""
    found = re.findall(rf"\b(?:{re.escape(yes)}|{re.escape(no)})\b", text, re.IGNORECASE)
    return found[-1].lower() == yes.lower() if found else None
