"""Every script of ``bench`` opens: what it takes from the package is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.core.bench import load

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCH.glob("*.py")))
def test_opens(name: str) -> None:
    assert callable(load(name).main)
