"""What devices can do, from their makers' data sheets."""

from __future__ import annotations

from pydantic import PositiveFloat

from penstock.core.config import Config
from penstock.core.devices import PEAK_BF16
from penstock.core.errors import UsageError, nearest


class Hardware(Config):
    """A device.

    Attributes:
        flops: dense bf16 rate in FLOP/s.
        bandwidth: of its memory, in bytes/s.
        memory: its size, in bytes.
    """

    flops: PositiveFloat
    bandwidth: PositiveFloat
    memory: PositiveFloat

    @property
    def intensity(self) -> float:
        """Operations that it could do while it reads a byte."""
        return self.flops / self.bandwidth


#: Devices by name: the SXM modules, of A100 the one with 80 GB.
DEVICES = {
    name: Hardware(flops=PEAK_BF16[name], bandwidth=bandwidth, memory=memory)
    for name, bandwidth, memory in (
        ("a100", 2.04e12, 80e9),
        ("h100", 3.35e12, 80e9),
        ("h200", 4.8e12, 141e9),
        ("b200", 8.0e12, 180e9),
    )
}


def named(name: str) -> Hardware:
    """The device ``name``.

    Raises:
        UsageError: none is known under it.
    """
    if name not in DEVICES:
        raise UsageError(f"no device {name!r} is known: {nearest(name, DEVICES)}")
    return DEVICES[name]
