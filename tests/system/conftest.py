"""One server for all tests that leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from served import Served


@pytest.fixture(scope="session")
def server() -> Iterator[Served]:
    """Room for 8 sequences and a queue of 4; a key is needed. Its engine is started as users' are."""
    with Served("--queue", "4", "--body-limit", "0.25", key="secret-1", as_shipped=True) as served:
        yield served
        assert not served.until_idle()["cache_blocks_held"]
