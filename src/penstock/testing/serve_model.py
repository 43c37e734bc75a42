"""The small model that the engine's suites serve."""

from __future__ import annotations

import copy
import functools

import torch

from penstock.core.randomness import torch_generator
from penstock.models.acceptance.head import AcceptanceHead, like
from penstock.models.config import DecoderConfig, MoEConfig
from penstock.models.decoder import Decoder
from penstock.models.heads.contract import Head, HeadModule
from penstock.models.heads.early_exit import EarlyExit
from penstock.models.heads.headed import Headed
from penstock.speculate.contract import Drafter
from penstock.testing.enrolled import enrolled

SHAPE = DecoderConfig(
    vocabulary=50,
    hidden=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    ffn=48,
    context=96,
    tied=False,
    init_std=0.3,
)


@functools.cache
def small_model() -> Decoder:
    """A decoder with random weights that are large enough for its choices to be clear."""
    return Decoder(SHAPE).initialize(0).eval()


#: The same with experts, of which two see each token.
MIXTURE = SHAPE.model_copy(update={"moe": MoEConfig(experts=6, ffn=24)})


@functools.cache
def small_mixture() -> Decoder:
    """As :func:`small_model`, with experts."""
    return Decoder(MIXTURE).initialize(0).eval()


def draft_of(model: Decoder, noise: float = 0.1) -> Decoder:
    """A model that is often, and not always, of the same mind as ``model``: what drafts for it in the suites."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            spread = noise * float(parameter.std()) if parameter.dim() > 1 else 0.0
            drawn = torch.randn(parameter.shape, generator=torch_generator(1, f"testing/draft/{name}"))
            parameter.add_(spread * drawn.to(parameter.device))
    return other


def head_of(model: Decoder, kind: Head | None = None) -> HeadModule:
    """A head that drafts for ``model`` in the suites, an exit behind its first layer if no other ``kind`` is named. It
    has learnt nothing."""
    kind = kind or EarlyExit(layers=1)
    return Headed.new(model, kind, seed=0).head.eval()


def head_for(drafter: Drafter, model: Decoder) -> HeadModule:
    """A head that ``drafter``, which drafts with one, drafts with for ``model`` in the suites."""
    kinds = [each for each in enrolled("model.head").values() if isinstance(each, Head)]
    own = [each for each in kinds if each.drafter == drafter.policy_name]
    return head_of(model, None if drafter.policy_name == EarlyExit.drafter else own[0])


def predictor_of(draft: Decoder) -> AcceptanceHead:
    """A head that predicts what is accepted of what ``draft`` drafts, in the suites. It has learnt nothing, and says
    all kinds of things."""
    head = like(draft).initialize(0).requires_grad_(False).eval()
    head.out.weight.copy_(torch.randn(head.out.weight.shape, generator=torch_generator(0, "testing/predictor")))
    head.out.bias.fill_(1.0)
    return head.to(draft.like.device, draft.like.dtype)


@functools.cache
def small_predictor() -> AcceptanceHead:
    """One for the small model's draft."""
    return predictor_of(small_draft())


@functools.cache
def small_draft() -> Decoder:
    """A model that drafts for the small one."""
    return draft_of(small_model())


@functools.cache
def small_head(drafter: Drafter) -> HeadModule:
    """A head that ``drafter`` drafts with for the small one."""
    return head_for(drafter, small_model())
