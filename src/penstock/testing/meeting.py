"""A place where processes of one host find each other."""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
from collections.abc import Iterator
from typing import NoReturn

import torch.distributed


@contextlib.contextmanager
def meeting(size: int) -> Iterator[dict[str, str]]:
    """The environment in which ``size`` processes of this host join each other until the end of the block.

    As under ``torchrun``, the store in which they do is there before them. A port that is looked for and then left to
    rank 0 may be somebody else's by then, and the other ranks wait for an hour, or join them.

    The store has a process of its own. In this one its thread would look up the names of those that come, behind a
    lock of the C library: a process forked at that moment would find the lock taken, and wait for ever.
    """
    told, tell = os.pipe()
    over, end = os.pipe()
    host = os.fork()
    if host == 0:
        os.close(end)
        _serve(size, tell, over)
    os.close(tell)
    os.close(over)
    try:
        with os.fdopen(told, "rb") as told_port:
            port = told_port.read().decode()
        assert port, "the process with the store has failed; its own message says why"
        yield {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": str(size),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
    finally:
        os.kill(host, signal.SIGKILL)
        os.waitpid(host, 0)
        os.close(end)


def _serve(size: int, tell: int, over: int) -> NoReturn:
    """Holds the store until it is killed, or nobody holds the other end of ``over`` any more."""
    try:
        store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", 0, world_size=size, is_master=True, wait_for_workers=False
        )
        os.write(tell, str(store.port).encode())
        os.close(tell)
        os.read(over, 1)
    except BaseException:
        traceback.print_exc()
    os._exit(1)
