"""By what the layers of a model are computed while it is trained."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch.utils.checkpoint import checkpoint as recompute

from penstock.models.decoder import Decoder, Layer


def run_layers(model: Decoder, recomputes: bool, run: Callable[..., Any] = Layer.forward) -> None:
    """From now on ``run`` computes the layers of ``model``. Where one ``recomputes`` activations, only the input of
    each layer is kept for the backward pass, which computes the rest again."""
    for layer in cast(Iterable[Layer], model.layers):
        forward = functools.partial(run, layer)
        if recomputes:
            forward = functools.partial(recompute, forward, use_reentrant=False, preserve_rng_state=False)
        layer.forward = forward  # type: ignore[method-assign]


def compile_layers(model: Decoder, recomputes: bool) -> None:
    """Compiles the layers of ``model``, from their next pass on: once for all that are alike, so that many take as long
    as one does. Where a loss is compiled that they are a part of, they are no part of that."""
    run_layers(model, recomputes, torch.compile(Layer.forward, dynamic=False))
    alone = torch.compiler.disable(model.through, recursive=False)  # type: ignore[no-untyped-call]
    model.through = alone  # type: ignore[method-assign]
