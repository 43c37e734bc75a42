"""Which format a model has: by name, or as its chat template tells."""

from __future__ import annotations

from penstock.policy import create, index
from penstock.serve.dialogue.contract import Dialogue
from penstock.serve.dialogue.formats.hermes import Hermes


def named(name: str) -> Dialogue:
    """The format called ``name``.

    Raises:
        UsageError: there is none; the message lists the nearest names.
    """
    found = create("serve.dialogue", name)
    assert isinstance(found, Dialogue)
    return found


def guess(template: str) -> Dialogue:
    """The format whose signs are all in ``template``; of several, the one with the most. Hermes' where there is none:
    with the functions written into the conversation, any model may follow it."""
    known = [entry.load() for entry in index().entries("serve.dialogue")]
    found = [each for each in known if issubclass(each, Dialogue) and all(sign in template for sign in each.signs)]
    best = max(found, key=lambda each: (len(each.signs), each.policy_name), default=Hermes)
    return best()
