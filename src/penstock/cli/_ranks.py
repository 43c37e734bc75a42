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


PIPELINE_PARALLEL = typer.Option(
    None,
    "--pipeline-parallel",
    metavar="N",
    min=1,
    help="Give each of N devices of this host, or on the CPU of N processes, some of the layers.",
)


def chosen_ranks(tensor_parallel: int | None, pipeline_parallel: int | None) -> dict[str, Any]:
    """The engine's options for ``--tensor-parallel`` and ``--pipeline-parallel``; none of one that is not given."""
    given = {"tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel}
    return {option: count for option, count in given.items() if count is not None}
