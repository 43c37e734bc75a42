"""Imports beside work that waits."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def importing(*modules: str) -> Iterator[None]:
    """While the block runs, a thread imports ``modules``, and at its end they are there: for what reads or copies
    meanwhile, and leaves the interpreter to others. One that cannot be imported is left to whoever needs it."""

    def load() -> None:
        for module in modules:
            with contextlib.suppress(ImportError):
                importlib.import_module(module)

    thread = threading.Thread(target=load, name="imports")
    thread.start()
    try:
        yield
    finally:
        thread.join()
