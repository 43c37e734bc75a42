"""Models that have a shape, and no weights yet, and models that are put together from weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from penstock.models.decoder import Decoder


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """What is built in this context lies on the meta device, and takes no memory."""
    with torch.device("meta"), _Uninitialized():
        yield


class _Uninitialized(TorchFunctionMode):
    """Skips torch's initializers, which on the meta device load torch's compiler: seconds for nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def assembled(like: Any, weights: Mapping[str, Tensor]) -> Decoder:
    """A Decoder of the shape of ``like`` and of its origin (``models/hub/family.py``), with ``weights`` by name."""
    with without_weights():
        model = Decoder(like.config)
    named = {
        name: nn.Parameter(weights[name], requires_grad=blank.requires_grad) for name, blank in model.named_parameters()
    }
    if like.config.shares_head:
        named["head.weight"] = named["embedding.weight"]
    model.load_state_dict(named, assign=True)
    vars(model).update({key: value for key, value in vars(like).items() if key == "origin"})
    return model
