"""A model whose layers are divided between two devices beside the same on one: one request at a time, and many.

As `tensor_parallel` measures it, with stages in the place of shares: without compiled passes on their side.
"""

from __future__ import annotations

from penstock.core.bench import Bench, load


def main(bench: Bench) -> None:
    """Measures the two in turn."""
    load("tensor_parallel").measure(bench, "pipeline_parallel")
