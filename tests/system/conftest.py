"""One server for all tests that leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from served import Served


@pytest.fixture(scope="session")
def server() -> Iterator[Served]:
    """Room for 8 sequences, a queue of 4, and 2 adapters; a key is needed."""
    from served import Served  # which a process that only hands out tests does not need

    options = ("--control", "--request-templates", "--set", "adapter_slots=2")
    with Served("--queue", "4", "--body-limit", "0.25", *options, key="secret-1") as served:
        yield served
        assert not served.until_idle()["cache_blocks_held"]
