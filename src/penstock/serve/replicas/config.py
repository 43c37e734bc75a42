"""How many replicas of a model there are, and how they are kept."""

from __future__ import annotations

from typing import Annotated

from pydantic import NonNegativeInt, PositiveInt, model_validator

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
    routing: Annotated[Routing, Choice("serve.routing", "prefix")] = LongestPrefix()
    restarts: NonNegativeInt = 3

    @model_validator(mode="after")
    def _several(self) -> Replication:
        said = {"routing": "which engine gets a request", "restarts": "how often an engine is started again that died"}
        for option in self.model_fields_set & said.keys() if self.replicas == 1 else ():
            raise ValueError(
                f"{option} says {said[option]}, and there is one: ask for several with --replicas 2, or leave it out"
            )
        return self
