"""What commands that open an engine say of the devices that a model is divided among."""

from __future__ import annotations

from typing import Any

import typer

TENSOR_PARALLEL = typer.Option(
    None,
    "--tensor-parallel",
    metavar="N",
    min=1,
    help="Divide the model among N devices of this host, or on the CPU among N processes.",
)


def chosen_ranks(tensor_parallel: int | None) -> dict[str, Any]:
    """The engine's options for ``--tensor-parallel``; none where it is not given."""
    return {} if tensor_parallel is None else {"tensor_parallel": tensor_parallel}
