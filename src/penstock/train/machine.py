"""What a configuration leaves to the machine, chosen for the machine that a run is on."""

from __future__ import annotations

import torch

from penstock.core.processor import Answer, fast_dtype
from penstock.parallel.world import World
from penstock.train.precision import Precision

#: From how many seconds of a run on compiling it pays, by device and by whether products are in bf16. On two cores it
#: takes about 60 s for the first shape and 15 s for each other, and makes steps of small models 1.0 to 1.3 times as
#: fast in fp32 and 1.3 to 1.9 times in bf16, whose many small conversions the compiler fuses.
WORTH_COMPILING = {("cpu", False): 1200.0, ("cpu", True): 180.0, ("cuda", False): 120.0, ("cuda", True): 120.0}


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
