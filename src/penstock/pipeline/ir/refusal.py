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


def check_positive(devices: int, microbatches: int) -> None:
    """Refuses what is no pipeline at all.

    Raises:
        UsageError: a number is not positive.
    """
    for what, number in (("devices", devices), ("microbatches", microbatches)):
        if number < 1:
            raise UsageError(f"a pipeline of {number} {what} does nothing", hint=f"Ask for one or more {what}.")
