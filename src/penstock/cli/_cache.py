"""What commands that open an engine say of its cache."""

from __future__ import annotations

from typing import Any

import typer

from penstock.core.errors import UsageError

KV = typer.Option(
    None, "--kv", metavar="POLICY", help="What the cache of a sequence keeps, such as h2o, snapkv or sink_window."
)
KV_BUDGET = typer.Option(
    None, "--kv-budget", metavar="X", help="How much of it: a share such as 0.25, or a number of tokens."
)
KV_WHEN = typer.Option(
    None,
    "--kv-when",
    metavar="WHEN",
    help="When it gives up the rest: due, at once; or pressure, once blocks are short.",
)
KV_REUSE = typer.Option(
    None,
    "--kv-reuse",
    metavar="POLICY",
    help="How contexts are encoded that requests name: ape or cache_craft; else in a row.",
)
KV_RECOMPUTE = typer.Option(
    None, "--kv-recompute", metavar="X", help="With cache_craft: the share of a moved context that is computed again."
)
KV_CODEC = typer.Option(
    None, "--kv-codec", metavar="CODEC", help="How the cache holds keys and values, such as int8; else plain."
)


def chosen_cache(
    kv: str | None,
    budget: float | None,
    when: str | None,
    codec: str | None,
    reuse: str | None,
    recompute: float | None,
) -> dict[str, Any]:
    """The engine's options for ``--kv``, ``--kv-budget``, ``--kv-when``, ``--kv-codec``, ``--kv-reuse`` and
    ``--kv-recompute``; none where none is given.

    Raises:
        UsageError: a budget of nothing, a time for it, or a share of it.
    """
    if kv is None and budget is not None:
        raise UsageError(
            f"--kv-budget {budget:g} says how much is kept, and not what",
            hint="Name a policy with --kv, such as h2o, snapkv or sink_window.",
        )
    if kv is None and when is not None:
        raise UsageError(
            f"--kv-when {when} says when a cache is compressed, and not what is kept of it",
            hint="Name a policy with --kv, such as h2o, snapkv or sink_window.",
        )
    chosen: dict[str, Any] = {}
    if kv is not None:
        options = {"name": kv, "budget": budget, "when": when}
        chosen["kv"] = {name: value for name, value in options.items() if value is not None}
    if codec is not None:
        chosen["codec"] = codec
    if reuse is None and recompute is not None:
        raise UsageError(
            f"--kv-recompute {recompute:g} says how much of contexts is computed again that are moved",
            hint="Move them with --kv-reuse cache_craft.",
        )
    if reuse is not None:
        chosen["kv_reuse"] = reuse if recompute is None else {"name": reuse, "recompute": recompute}
    return chosen
