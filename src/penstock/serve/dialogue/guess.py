"""Which format a model has: by name, or as its chat template tells."""

from __future__ import annotations

import re

from penstock.policy import create, index
from penstock.serve.dialogue.contract import Dialogue
from penstock.serve.dialogue.formats.hermes import Hermes

#: The variable in which a template gets functions.
TOOLS = re.compile(r"\btools\b")


def named(name: str) -> Dialogue:
    """The format called ``name``.

    Raises:
        UsageError: there is none; the message lists the nearest names.
    """
    found = create("serve.dialogue", name)
    assert isinstance(found, Dialogue)
    return found


def guess(template: str) -> Dialogue:
    """The format that :func:`told` finds, or Hermes': with the functions written into the conversation, any model may
    follow it."""
    return (told(template) or Hermes)()


def told(template: str) -> type[Dialogue] | None:
    """The format whose signs are all in ``template``; of several, the one with the most."""
    known = [entry.load() for entry in index().entries("serve.dialogue")]
    found = [each for each in known if issubclass(each, Dialogue) and all(sign in template for sign in each.signs)]
    return max(found, key=lambda each: (len(each.signs), each.policy_name), default=None)


def doubt(template: str) -> str | None:
    """A warning, where ``template`` writes functions into the conversation and tells of no format that is known: calls
    in any other than Hermes' would be read as content."""
    if TOOLS.search(template) is None or told(template) is not None:
        return None
    return (
        "the model's chat template tells of no known form of calls; they are read as hermes writes them, and in any "
        f"other form they are content. Name the model's own by --dialogue: {', '.join(index().names('serve.dialogue'))}"
    )
