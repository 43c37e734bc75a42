"""Ranks that divide a tiny model among them, forked from one process, and the families that it may be of."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.families.contract import Family
from penstock.models.shares import Share
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.opening import open_share
from penstock.testing import divided_engine
from penstock.testing.enrolled import enrolled
from penstock.testing.transformers_peer import SHAPE, TOKEN_IDS

FAMILIES: Mapping[str, Family] = enrolled("model.family")


def example(name: str) -> DecoderConfig:
    """A tiny shape in which everything that the family has makes a difference."""
    family = FAMILIES[name]
    keys = {**SHAPE, **dict.fromkeys(TOKEN_IDS), **family.example}
    return family.config_from_hub(AutoConfig.for_model(name, **keys).to_dict())


@contextlib.contextmanager
def ending_all(ends: Iterable[tuple[socket.socket, socket.socket]]) -> Iterator[None]:
    """Ends all channels when this process fails: each process has all ``ends`` open, and would wait for what it could
    say itself."""
    try:
        yield
    except BaseException:
        for pair in ends:
            pair[0].shutdown(socket.SHUT_RDWR)
        raise


def together(
    size: int,
    folder: Path,
    config: EngineConfig,
    act: Callable[[Engine], Any],
    change: Callable[[int, Decoder], object] = lambda rank, model: None,
) -> list[dict[str, Any]]:
    """What ``act`` returns of an engine whose model, that in ``folder``, is divided among ``size`` ranks; ``change`` is
    called with each rank and what it has of the model."""

    def part(share: Share) -> Decoder:
        model = open_share(folder, config, torch.device("cpu"), share)
        change(share.rank, model)
        return model

    return divided_engine.together(size, part, config, act)
