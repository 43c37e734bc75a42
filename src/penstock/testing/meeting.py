"""A place where processes of one host find each other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed


@contextlib.contextmanager
def meeting(size: int) -> Iterator[dict[str, str]]:
    """The environment in which ``size`` processes of this host join each other until the end of the block.

    As under ``torchrun``, the store in which they do is that of the process which starts them. A port that is looked
    for and then left to rank 0 may be somebody else's by then, and the other ranks wait for an hour, or join them.
    """
    store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, world_size=size, is_master=True, wait_for_workers=False
    )
    yield {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(size),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    del store
