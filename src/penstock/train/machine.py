"""What a configuration leaves to the machine, chosen for the machine that a run is on."""

from __future__ import annotations

import torch

from penstock.core.processor import Answer, fast_dtype
from penstock.parallel.world import World
from penstock.train.precision import Precision

#: From how many seconds of a run on compiling it pays, by device and by whether products are in bf16. It takes about
#: 20 s for each shape, however many layers there are, on two cores and on an H200, and makes steps of small models on
#: two cores 1.0 to 1.3 times as fast in fp32 and 1.2 to 1.9 times in bf16, whose many small conversions it fuses.
WORTH_COMPILING = {("cpu", False): 400.0, ("cpu", True): 120.0, ("cuda", False): 90.0, ("cuda", True): 90.0}


def fast_precision(device: torch.device, world: World) -> Answer[Precision]:
    """The precision that is fast on the devices of all processes, each of which asks."""
    fast = fast_dtype(device)
    slow_somewhere = world.largest(float(fast.choice is torch.float32))[0]
    if slow_somewhere and fast.choice is torch.bfloat16:
        return Answer("fp32", "bf16 is slow on the device of another process")
    return Answer("fp32" if slow_somewhere else "bf16", fast.reason)


def worth_compiling(device: torch.device, precision: Precision, seconds: float) -> Answer[bool]:
    """Whether a run of ``seconds`` wins back what compiling takes."""
    least = WORTH_COMPILING[device.type, precision != "fp32"]
    if seconds < least:
        return Answer(False, f"that pays from {least:.0f} s on in {precision} here, and this run takes {seconds:.0f} s")
    return Answer(True, f"that pays from {least:.0f} s on in {precision} here, which this run takes")
