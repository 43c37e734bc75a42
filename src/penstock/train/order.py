"""Where a run that goes on is in its data.

A position counts windows, and the order of windows depends on their length, on the sampler and on the seed. Where one
of these has changed, the run keeps its place by tokens, and says that the order is another one from here on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.core.config import build
from penstock.train.config import BatchConfig, TrainConfig


def carry_on(samples: int, former: Mapping[str, Any], now: TrainConfig) -> tuple[int, str]:
    """The position of a run whose checkpoint had read ``samples`` windows under the configuration ``former``.

    Returns:
        The windows of today's length with as many tokens, and what the user should know, or nothing.
    """
    length = build(BatchConfig, former["batch"]).length
    place = samples * length // now.batch.length
    compared = {
        "sequences of": (length, now.batch.length),
        "data.sampler": (former["data"]["sampler"]["name"], now.data.sampler.policy_name),
        "seed": (former["seed"], now.seed),
    }
    changed = [f"{what} {today}, not {then}" for what, (then, today) in compared.items() if then != today]
    if not samples or not changed:
        return place, ""
    return place, (
        f"the order of the data is another one from here on ({', '.join(changed)}): the run goes on after "
        f"{place * now.batch.length:,} tokens of it, and within this epoch some text comes again and some is left out"
    )
