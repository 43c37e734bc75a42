"""What commands that load a model say of the memory that its weights may take."""

from __future__ import annotations

from typing import Any

import typer

RESIDENT_WEIGHTS = typer.Option(
    None,
    "--resident-weights",
    metavar="BYTES",
    help="Most memory for weights, such as 8GB: layers that do not fit are read from disk in each pass. On a CPU.",
)


def chosen_weights(resident: str | None) -> dict[str, Any]:
    """The engine's options for ``--resident-weights``; none where it is not given."""
    return {} if resident is None else {"resident_weights": resident}
