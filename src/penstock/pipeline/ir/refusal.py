"""Numbers of devices and microbatches for which there is no schedule."""

from __future__ import annotations

from penstock.core.errors import UsageError


class RefusalError(UsageError):
    """A schedule does not exist for these numbers of devices and microbatches.

    ``devices`` and ``microbatches`` are the nearest larger ones for which it does.
    """

    def __init__(self, what: str, *, devices: int, microbatches: int) -> None:
        super().__init__(what, hint=f"It works with {devices} devices and {microbatches} microbatches.")
        self.devices = devices
        self.microbatches = microbatches


#: Microbatches of all devices together, at most: ordering more of them would take hours and all memory.
LARGEST = 1 << 24


def check_size(devices: int, microbatches: int) -> None:
    """Refuses what is no pipeline at all, and what is too large for anybody.

    Raises:
        UsageError: a number is not positive, or both together are too large.
    """
    if devices * microbatches > LARGEST:
        raise UsageError(
            f"{devices:,} devices with {microbatches:,} microbatches each are more than can be ordered",
            hint=f"All together may have {LARGEST:,} microbatches.",
        )
    for what, number in (("devices", devices), ("microbatches", microbatches)):
        if number < 1:
            raise UsageError(f"a pipeline of {number} {what} does nothing", hint=f"Ask for one or more {what}.")
