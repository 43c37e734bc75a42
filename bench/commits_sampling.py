"""Sampling in this tree beside an earlier one, in turn; ``bench/commits.py`` says where that is."""

from __future__ import annotations

from penstock.core.bench import Bench, load

#: What ``bench/sampler.py`` of earlier trees does not have.
LATER = {"temperature 0.8, top-k 40, top-p 0.95"}


def main(bench: Bench) -> None:
    """Measures a step of each kind of request at a small and at a large vocabulary."""
    commits, kinds = load("commits"), load("sampler").KINDS
    settings = [(kind, size) for size in (4096, 151_936) for kind in kinds if kind not in LATER]
    with commits.trees(bench.device) as both:
        for kind, size in settings[:1] if bench.quick else settings:
            commits.beside(
                bench,
                both,
                "sampling",
                (kind, size),
                setting=f"64 rows, vocabulary {size:,}, {kind}",
                metric="a step of sampling",
                unit="us",
                better="lower",
            )
