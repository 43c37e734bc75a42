"""Speculation where decoding is bound by memory: the models of `speculate` on a GPU, one of them widened.

python-150m's feed-forwards get as many more columns as make it a model of eight billion parameters, and the rows behind
these are 0, so that it says what it said before; python-15m drafts for it, or its own text does. On a CPU, where it
only shows that it works, python-6m becomes twice as large.
"""

from __future__ import annotations

import torch

from penstock.core.bench import Bench, load
from penstock.core.garbage import settled
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder

usual = load("speculate_cuda")

#: Parameters of the target; requests at a time, and the tokens wanted after each prompt; and requests at least.
PARAMETERS, CROWDS, LEAST = 8e9, {1: 128, 8: 128, 64: 128}, 4


def count(model: Decoder) -> int:
    """Its parameters."""
    return sum(each.numel() for each in model.parameters())


def widened(target: Decoder, parameters: float) -> Decoder:
    """A model of about so many ``parameters`` that says what ``target`` says: its feed-forwards have more columns,
    which come to nothing."""
    config, like = target.config, target.like
    more = (parameters - count(target)) / (3 * config.hidden * config.layers)
    made = DecoderConfig.model_validate({**config.model_dump(), "ffn": config.ffn + 64 * round(more / 64)})
    with like.device:
        wide = Decoder(made)
    wide = wide.initialize(0).to(like.device, like.dtype).eval()
    known = target.state_dict()
    with torch.no_grad():
        for name, place in wide.state_dict().items():
            own = known[name]
            if name.endswith("gate_up.weight"):
                for there, here in zip(place.chunk(2), own.chunk(2), strict=True):
                    there[: len(here)] = here
            elif name.endswith("down.weight"):
                place.zero_()
                place[:, : own.shape[1]] = own
            else:
                place.copy_(own)
    return wide


def main(bench: Bench) -> None:
    """Measures on the device of ``bench``."""
    target, draft, pieces = usual.models(bench)
    wanted = PARAMETERS if bench.device.type == "cuda" else 2 * count(target)
    engines = usual.opened(bench, widened(target, wanted), draft)
    with settled():  # as a server is
        usual.by_crowd(bench, engines, pieces, CROWDS, LEAST)
