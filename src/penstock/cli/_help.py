"""Help that knows what is registered."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand

#: Stands for the names of a contract's policies, such as ``{kv.policy}``.
_CONTRACT = re.compile(r"\{([a-z]+\.[a-z_]+)\}")


class Command(TyperCommand):
    """A command whose options may name a contract in braces, in whose place its help has the names of all policies,
    those of plug-ins too. They are looked up when somebody asks for help, and not at every start."""

    def format_help(self, *given: Any) -> None:
        for parameter in self.params:
            if getattr(parameter, "help", None):
                parameter.help = named(parameter.help)  # type: ignore[attr-defined]
        super().format_help(*given)


def named(text: str) -> str:
    """``text`` with the names of policies."""
    from penstock.policy import index

    return _CONTRACT.sub(lambda found: ", ".join(index().names(found[1])), text)
