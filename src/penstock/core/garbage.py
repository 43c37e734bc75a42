"""When garbage is collected, and of what."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """For the imports of a program that is about to work: nothing is collected meanwhile, and what is there at the end
    is taken for permanent. Modules make some hundred thousand objects that stay, and each collection amidst would look
    through those that there are by then.

    Not for libraries, which do not know what else there is.
    """
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if on:
            gc.enable()


def settle() -> None:
    """Takes all that there is now for permanent, the garbage aside. A full collection looks through every object that
    a process has, in which nothing else is done: some tenths of a second after PyTorch and a compiler were loaded,
    which everybody waits for who is being served.

    For processes that keep to the end what they have opened: of what is there now, no cycle is ever freed.
    """
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """What :func:`settle` does, for as long as the context lasts; at its end nothing is settled any more."""
    settle()
    try:
        yield
    finally:
        gc.unfreeze()
