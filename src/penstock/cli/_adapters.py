"""What commands that open an engine say of adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

ADAPTER = typer.Option(
    [],
    "--adapter",
    metavar="NAME=FOLDER",
    help="A LoRA adapter, which requests choose by naming it as their model. May be given again.",
)


def chosen_adapters(given: Sequence[str], model: str) -> dict[str, Any]:
    """The engine's options for ``--adapter``; none where it is not given. ``model`` is what requests call the model.

    Raises:
        UsageError: one has no name or another's, or there is none in its folder.
    """
    from penstock.core.errors import UsageError
    from penstock.models import hub

    found: dict[str, str] = {}
    for each in given:
        name, separator, folder = each.partition("=")
        if not (separator and name and folder):
            raise UsageError(f"cannot read --adapter {each!r}", hint="Write --adapter NAME=FOLDER.")
        if name == model or name in found:
            raise UsageError(f"two models are called {name!r}", hint="Choose another name for the adapter.")
        found[name] = str(hub.resolve_adapter(folder))
    return {"adapters": found} if found else {}
