"""Starts the process of an engine. It imports nothing of the engine, so that the process can begin to do so before this
one has done anything else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from types import MappingProxyType


def start(end: int, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Starts the process of an engine, which gets the file descriptor ``end`` of a socket pair, and the variables of
    ``environment`` beside those of this process.

    It has a session of its own: a terminal's Ctrl-C is for the front end, which ends the engine when it is done.
    """
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "penstock.serve.link", str(end)],
        pass_fds=[end],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, **environment},
    )


class Starting:
    """The process of an engine that nobody has said yet what to open: it imports what it will need, and waits.

    Args:
        environment: variables of the process, beside those of this one.

    Attributes:
        process: that was started.
        socket: to it.
    """

    def __init__(self, environment: Mapping[str, str] = MappingProxyType({})) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = start(theirs.fileno(), environment)

    def close(self) -> None:
        """Ends the process, if it has not ended."""
        self.socket.close()
        self.process.kill()
        self.process.wait()
