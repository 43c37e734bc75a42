"""How many replicas of a model there are, and how they are kept."""

from __future__ import annotations

from typing import Annotated

from pydantic import NonNegativeInt, PositiveInt

from penstock.core.config import Config
from penstock.policy import Choice
from penstock.serve.routing.contract import Routing
from penstock.serve.routing.prefix import LongestPrefix


class Replication(Config):
    """Several engines with the same model.

    Attributes:
        replicas: how many.
        routing: which of them a request is sent to.
        restarts: how often, within an hour, one that has died is started again.
    """

    replicas: PositiveInt = 1
    routing: Annotated[Routing, Choice("serve.routing")] = LongestPrefix()
    restarts: NonNegativeInt = 3
