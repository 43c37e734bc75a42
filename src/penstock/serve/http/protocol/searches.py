"""The field ``search`` of a chat: a program of test-time search spends a budget on the answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from penstock.serve.http.protocol.body import Body

#: Options of programs are numbers: texts and patterns are for whoever runs the server. Whole ones count branches.
Option = bool | Annotated[int, Field(ge=-256, le=256)] | Annotated[float, Field(ge=-1e6, le=1e6)]


class SearchField(Body):
    """What is searched for, and for how much."""

    #: Its name, as ``penstock search --program`` knows it.
    program: Annotated[str, Field(max_length=100)] = "best_of_n"
    options: Annotated[dict[str, Option], Field(max_length=32)] = Field(default_factory=dict)
    #: The most that it may spend, of ``unit``.
    budget: Annotated[int, Field(ge=1)]
    unit: Literal["generated", "tokens"] = "generated"
    #: The name of a scorer that the server offers.
    scorer: Annotated[str, Field(max_length=100)] | None = None
    #: What ends a step of a text.
    step: Annotated[str, Field(min_length=1, max_length=100)] = "\n\n"
    #: What the scorer knows of the problem, such as its ``answer`` or its ``tests``.
    problem: dict[str, Any] = Field(default_factory=dict)
