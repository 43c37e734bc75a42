"""Plain generation: one sequence, its keys and values kept, a token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from penstock.core.errors import ModelError, UsageError
from penstock.core.randomness import derive, uniforms
from penstock.models.attention import CachedRows
from penstock.models.decoder import Decoder
from penstock.models.sampling import Sampling, draw, probabilities


def generate(model: Decoder, prompt: Sequence[int], sampling: Sampling, stop: frozenset[int]) -> Iterator[int]:
    """The tokens that follow ``prompt``, up to and without one of ``stop``, until the model's context is full.

    The draw of token i depends on the seed and i alone.

    Raises:
        UsageError: the prompt is empty, or does not fit the model's context.
        ModelError: the prompt has a token that the model has no embedding for.
    """
    if not prompt:
        raise UsageError("the prompt is empty", hint="Give at least one token to continue.")
    if len(prompt) >= model.config.context:
        raise UsageError(
            f"the prompt has {len(prompt)} tokens, and the model's context is {model.config.context}",
            hint="Shorten the prompt.",
        )
    foreign = [token for token in prompt if not 0 <= token < model.config.vocabulary]
    if foreign:
        raise ModelError(
            f"the prompt has the token {foreign[0]}, and the model's embedding ends at {model.config.vocabulary - 1}",
            hint="The tokenizer beside the model is not its own: it has more tokens.",
        )
    return _generate(model, prompt, sampling, stop)


@torch.inference_mode()
def _generate(model: Decoder, prompt: Sequence[int], sampling: Sampling, stop: frozenset[int]) -> Iterator[int]:
    device = model.like.device
    context = CachedRows()
    tokens = torch.tensor([list(prompt)], device=device)
    most = min(sampling.max_tokens, model.config.context - len(prompt))
    uniform = torch.from_numpy(uniforms(derive(sampling.seed, "sample"), np.arange(most)))
    for count in range(most):
        hidden = model(tokens, context.extend(tokens.shape[1], device)).hidden[0, -1]
        chances = probabilities(model.logits(hidden).double().cpu(), sampling)
        token = int(draw(chances, uniform[count]))
        if token in stop:
            return
        yield token
        tokens = torch.tensor([[token]], device=device)
